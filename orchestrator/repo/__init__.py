"""Everything that touches git: `git.command.Git` is the only way to run it.

`source` is the user's repository, `worktrees` the checkouts of sessions, `intake` brings commits of agents in,
`landing` moves the target. Each may import those before it.
"""
