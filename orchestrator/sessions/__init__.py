"""Run a CLI in a worktree. Entry point: `session.Session`.

`supervision` starts the program and stops all its processes, `sandbox` confines it, `setup` prepares the worktree,
`output` reads what it prints, `socket` receives its requests.
"""
