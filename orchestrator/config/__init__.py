"""Read a YAML file into a validated `RunConfig`.

`load` is the entry point, `schema` defines the keys, `model` is the result, with all defaults resolved. May import
`protocols`, `domain` and `errors`.
"""
