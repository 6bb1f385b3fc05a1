"""Run one CLI in a worktree: `session.Session` is the entry point.

`supervision` starts the program and ends all its processes, `sandbox` confines it, `setup` prepares the worktree,
`output` reads what it prints, `socket` receives its requests.
"""
