"""The process that encodes an item snapshot for a service which goes on answering meanwhile.

`python -m service.item_build BUNDLE SNAPSHOT TARGET SUMS LOG_LEVEL` writes TARGET for
`map_item_file`, with the items' sums if SUMS is 1.
It ends when its stdin does: the service holds the other end, and nobody else wants the table.
"""

import os
import sys
import threading
from pathlib import Path

EXIT_REFUSED, EXIT_FAILED = 3, 4
_NICENESS = 10  # the requests come first


def build(bundle: Path, snapshot: Path, target: Path, *, has_sums: bool, log_level: str) -> int:
    """Returns the exit code: EXIT_REFUSED for a wrong snapshot, EXIT_FAILED for what may pass.

    Then stdout says what is wrong.
    """
    os.nice(_NICENESS)
    # Imported here: that takes half a second of a core, and the requests come first then, too.
    import click

    from model.contract.bundle import read_bundle
    from model.contract.encode import Encoder
    from model.contract.errors import BundleCorrupt, BundleNotFound, ContractError
    from service.item_snapshot import write_item_file
    from service.item_sums import ItemSums
    from service.log_lines import configure_logging
    from service.refusal import may_pass

    configure_logging(log_level)
    try:
        read = read_bundle(bundle)
        item_sums = ItemSums(read.parts) if has_sums and read.parts is not None else None
        write_item_file(snapshot, Encoder(read.fitted), target, item_sums=item_sums)
    except ContractError as exc:
        click.echo(str(exc))
        # The service has just read the bundle: if that is not whole now, it is being replaced.
        is_passing = may_pass(exc) or isinstance(exc, BundleNotFound | BundleCorrupt)
        return EXIT_FAILED if is_passing else EXIT_REFUSED
    except OSError as exc:
        click.echo(f"item snapshot {snapshot}: its table cannot be written: {exc.strerror}")
        return EXIT_FAILED
    return 0


def _end_with_stdin() -> None:
    os.read(0, 1)  # Not `sys.stdin`: its lock, held at the end of the interpreter, aborts it.
    os._exit(EXIT_FAILED)


if __name__ == "__main__":
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    _, *paths, sums, level = sys.argv
    sys.exit(build(*map(Path, paths), has_sums=sums == "1", log_level=level))
