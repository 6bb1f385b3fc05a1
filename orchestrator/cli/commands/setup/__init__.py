"""Commands that prepare a repository: files, adapters, schemas, diagnostics."""
