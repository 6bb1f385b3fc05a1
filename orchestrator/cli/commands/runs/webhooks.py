"""The command that receives the webhooks of forges."""

from __future__ import annotations

import os

import click

from orchestrator.cli.core.command import CouncilContext, council_command
from orchestrator.errors import RefusedError


@click.command("serve-webhooks")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=8787, show_default=True, type=click.IntRange(0, 65_535), help="The port; 0: any.")
@click.option(
    "--secret",
    metavar="VARIABLE",
    default="COUNCIL_WEBHOOK_SECRET",
    show_default=True,
    help="The variable with the secret of the webhooks.",
)
@council_command()
async def serve_webhooks(context: CouncilContext, *, host: str, port: int, secret: str) -> None:
    """Let active runs read boards and pull requests as soon as a forge reports a change.

    Set the URL of this server and the secret as a webhook of the repository: for issues, comments, pull requests,
    reviews and checks. Without it, runs read them every `sync_interval`. Ctrl-C ends it. A forge can reach it only
    through a proxy or a tunnel with TLS.

    \b
    Examples:
      council serve-webhooks
      council serve-webhooks --port 9000 --secret SHOP_WEBHOOK_SECRET
    """
    value = os.environ.get(secret, "")
    if not value:
        raise RefusedError(f"there is no secret: ${secret} is not set", "set it to the secret of the webhook")
    output, runs = context.output, context.council.runs

    def on_start(chosen: int) -> None:
        if output.as_json:
            output.json({"event": "listening", "host": host, "port": chosen})
        else:
            output.text(f"listening on http://{host}:{chosen}\n")

    async def on_change() -> None:
        await runs.report_forge_change()

    try:
        from orchestrator.forges.webhooks import serve_webhooks as serve  # noqa: PLC0415  needs an optional package
    except ModuleNotFoundError as error:
        remedy = "install it: `pip install 'cli-council[forge]'`"
        raise RefusedError(f"the package {error.name} is not installed", remedy) from error
    try:
        await serve(host, port, value, on_change, on_start)
    except OSError as error:
        message = f"can't listen on {host}:{port}: {error.strerror or error}"
        raise RefusedError(message, "choose another address or port") from error
