"""All git access. `git.command.Git` is the only module that runs git.

`source` is the user's repository, `worktrees` the session checkouts, `intake` imports agents' commits, `landing` moves
the target branch. Each package may import only the ones listed before it.
"""
