"""Commands that run the node: serve, receive, work, web, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli.options import DEFAULT_CONFIG, ConfigOption, JsonOption, console, print_json

__all__ = ["demo", "receive", "serve", "web", "work"]


def serve(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Run the whole node in the foreground: receiver, worker and, where it is enabled, the status page.

    Prints `ready` when it accepts associations.
    """
    from dicomnode import serve as node
    from dicomnode.config import load

    node.run(config, load(config))


def receive(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Run the receiving process alone (for systemd)."""
    from dicomnode import receive as receiver
    from dicomnode import serve as node

    node.foreground("receive", receiver.run, config)


def work(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Run the working process alone: match, deblur, deliver (for systemd)."""
    from dicomnode import serve as node
    from dicomnode import work as worker

    node.foreground("work", worker.run, config)


def web(
    config: ConfigOption = DEFAULT_CONFIG,
    link: Annotated[bool, typer.Option("--link", help="Print an address that lets a browser in once; end.")] = False,
) -> None:
    """Run the status page and REST API alone (for systemd)."""
    if link:
        import getpass
        import os

        from dicomnode.config import load
        from dicomnode.web import login

        typer.echo(login.link(load(config), os.environ.get("SUDO_USER") or getpass.getuser()))
        return
    from dicomnode import serve as node
    from dicomnode.web import run as server

    node.foreground("web", server.run, config)


def demo(
    out_dir: Annotated[Path, typer.Argument(help="Where the picture and the DICOM go.")] = Path("dicomnode-demo"),
    method: Annotated[str, typer.Option(help="Deconvolution method.")] = "nbd",
    preset: Annotated[str, typer.Option(help="The method's preset.")] = "best",
    as_json: JsonOption = False,
) -> None:
    """Send a synthetic PET and CT through a whole node on this machine and show what comes back."""
    from dicomnode import demo as demonstration

    figures = demonstration.run(out_dir, method=method, preset=preset, console=console(err=as_json))
    if as_json:
        print_json(figures)
