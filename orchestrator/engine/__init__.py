"""Execute a run; the entry point is `scheduler.loop.Scheduler`.

`state` reads and changes the documents of a run, `phases` selects the next step after a session, `landing` is the merge
queue, `checks` runs the commands that decide whether work may land, `session_api` serves requests of sessions,
`diagnostics` checks a machine and a repository before a run, `reports` builds results, `views` exports the state,
`cleanup` finds leftovers. `run_context` has a run's resources.
"""
