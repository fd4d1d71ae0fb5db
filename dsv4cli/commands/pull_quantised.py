"""`dsv4 pull NAME --quant RECIPE`: a checkpoint becomes a smaller GGUF while it arrives, and is never here as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from dsv4cli import console, paths, settings
from dsv4cli.commands import transfer
from dsv4cli.commands.quantize_plan import Wanted, planned
from dsv4cli.console import in_bytes
from dsv4cli.errors import Interrupted

if TYPE_CHECKING:
    from dsv4_quant.arriving import Arriving
    from dsv4_quant.convert import Conversion
    from dsv4_quant.files.headers import Head
    from dsv4_quant.plan import Plan
    from dsv4cli.registry.download import State
    from dsv4cli.registry.streamed import Streamed


class Manner(NamedTuple):
    """How to go about it. `rate`: bytes a second at most; `ask`: whether to go on, once it is known what is to come."""

    rate: float | None
    quiet: bool
    ask: Callable[[str], bool]


def carry_out(streamed: Streamed, manner: Manner) -> None:
    """Fetches, makes and installs the model, going on where an earlier run stopped. Raises Interrupted if the answer is no."""
    with streamed.locked():
        if not streamed.described():
            _make(streamed, manner)
        model = streamed.finish()
    if not manner.quiet:
        console.note(f"{streamed.entry.name} is here: {in_bytes(model.stat().st_size)}, {model}.")


def _make(streamed: Streamed, manner: Manner) -> None:
    """Everything up to the manifest."""
    began = not streamed.folder.exists()
    with console.working(f"reading the headers of {len(streamed.shards)} shards…", manner.quiet):
        heads = streamed.look(manner.rate)
    plan = _plan(streamed, heads)
    with console.working("opening torch…", manner.quiet):
        from dsv4_quant.arriving import Arriving
        from dsv4_quant.convert import Conversion, device_called
        from dsv4_quant.files.official import OfficialSource
        from dsv4_quant.spread import Spread

    source, sizes = OfficialSource(plan.source), {shard: head.size for shard, head in sorted(heads.items())}
    peak = Spread(plan.each_piece(), source).peak(sizes)
    if streamed.keep:
        peak = plan.nbytes + sum(sizes.values())
    streamed.check_disk(peak)
    with Conversion(plan, source, force=True, device=device_called(settings.load()["device"])) as conversion:
        maker = Arriving(conversion, source, sizes, streamed.folder / "kept", streamed.keep)
        for line in () if manner.quiet else _told(streamed, plan, maker, peak):
            console.note(line)
        if not manner.ask("Fetch and quantise it?"):
            if began:
                shutil.rmtree(streamed.folder)
            raise Interrupted("Not fetched.")
        _run(streamed, conversion, maker, manner)
        conversion.finish()
        context = plan.source.config.max_position_embeddings
        transfer.watch(streamed.describe(plan.output, context), f"hashing {streamed.entry.name}", manner.quiet)
        conversion.forget()


def _plan(streamed: Streamed, heads: dict[str, Head]) -> Plan:
    """What `dsv4 quantize` would write of the checkpoint if it were here."""
    from dsv4_quant.files.headers import header_of_heads

    wanted = Wanted(str(streamed.folder), streamed.entry.recipe, {}, "none", None, None, settings.load()["release"])
    return planned(streamed.origin(), wanted, None, header_of_heads(streamed.source.folder, heads))


def _told(streamed: Streamed, plan: Plan, maker: Arriving, peak: int) -> Iterator[str]:
    """What will be fetched, what becomes of it, what it takes."""
    origin, needed = streamed.origin(), streamed.needed(maker)
    missing = sum(file.size - streamed.source.present(file) for file in needed)
    license = f", license {origin.license}" if origin.license else ""
    yield (f"{streamed.entry.name}: {len(needed)} of {len(streamed.shards)} shards, {in_bytes(missing)} to fetch, from "
           f"{origin.repo} at {str(origin.revision)[:12]}{license}.")
    stays = "the checkpoint stays" if streamed.keep else "shards go when they are used"
    seconds = streamed.seconds(missing)
    time = f"; about {transfer.duration(seconds)} at the rate of the last download" if seconds is not None else ""
    yield (f"They become one file of {in_bytes(plan.nbytes)}; {stays}. While it is made it takes up to {in_bytes(peak)} of "
           f"the disk of {paths.models()}; free: {in_bytes(streamed.plan.free)}{time}.")


def _run(streamed: Streamed, conversion: Conversion, maker: Arriving, manner: Manner) -> None:
    def told() -> Iterator[State]:
        for state in streamed.run(maker, manner.rate):
            state.beside = f"{100 * conversion.done // conversion.total} % quantised"
            yield state

    with console.resumable(streamed.folder):
        state = transfer.watch(told(), streamed.entry.name, manner.quiet)
    streamed.note_rate(state)
