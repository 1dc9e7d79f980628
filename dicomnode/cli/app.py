"""The `dicomnode` program: its commands, and the one place where an error becomes a sentence and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dicomnode import __version__
from dicomnode.cli import acting, evaluating, looking, offline, psf, reconciling, repairing, reporting, running
from dicomnode.errors import Exit, NodeError

__all__ = ["app"]


class Door(TyperGroup):
    """Turns what a command raises into one sentence on stderr and an exit code; `--debug` lets it through."""

    def invoke(self, ctx: Any) -> Any:
        from sop.errors import Refused  # a leaf: loads nothing else

        try:
            return super().invoke(ctx)
        except Refused as error:
            return _leave(ctx, error, f"{error}", Exit.REFUSED)
        except NodeError as error:
            return _leave(ctx, error, f"{error}", error.exit_code)
        except BrokenPipeError:
            sys.stderr.close()  # whoever read our output has left; nothing more can be said
            raise typer.Exit(Exit.FAILED) from None
        except OSError as error:
            return _leave(ctx, error, f"{error}", Exit.FAILED)
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("typer", "click"):
                raise  # usage errors and exits: typer's own business
            sentence = f"unexpected {type(error).__name__}: {error}. Remedy: report what --debug shows"
            return _leave(ctx, error, sentence, Exit.FAILED)


def _leave(ctx: Any, error: Exception, sentence: str, code: int) -> None:
    if ctx.params.get("debug"):
        raise error
    typer.echo(f"dicomnode: {sentence}", err=True)
    raise typer.Exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dicomnode {__version__}")
        raise typer.Exit()


app = typer.Typer(cls=Door, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """A DICOM node that deblurs PET by neural blind deconvolution. Research use, not for diagnosis.

    Exit codes: 0 done, 1 failed, 2 usage, 3 refused input, 4 peer unreachable.
    """


def _add(panel: str, commands: dict[str, Callable[..., None]]) -> None:
    for name, function in commands.items():
        app.command(name, rich_help_panel=panel)(function)


_add("Try", {"demo": running.demo, "phantom": offline.phantom})
_add("Run", {"serve": running.serve, "receive": running.receive, "work": running.work, "web": running.web,
             "check": looking.check})
_add("Look", {"status": looking.status, "jobs": looking.jobs, "show": looking.show, "report": reporting.report,
              "alert": looking.alert,
              "psf": psf.psf, "find": reconciling.find, "reconcile": reconciling.reconcile})
_add("Decide", {"retry": acting.retry, "hold": acting.hold, "release": acting.release, "cancel": acting.cancel,
                "urgent": acting.urgent, "fetch": reconciling.fetch, "repair": repairing.repair})
_add("Without the node", {"deblur": offline.deblur, "verify": offline.verify, "evaluate": evaluating.evaluate,
                          "calibrate": psf.calibrate})
