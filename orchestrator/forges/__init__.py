"""Issues of forges as tasks: the trackers `github` and `gitlab`.

`tracker` decides what to read and write, `issues` and `state_comment` convert (pure), `github` and `gitlab` know the
APIs, and `http` sends requests. Needs the extra `forge`.
"""
