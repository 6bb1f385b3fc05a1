"""Stand-ins for real CLIs and servers: they print what those were seen to print, and really edit files."""
