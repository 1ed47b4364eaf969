"""The Python lines that make the mix of the desk."""

from __future__ import annotations

from latentmill.view.desk import Desk
from latentmill.view.query import MixRequest


def python_lines(desk: Desk, mix: MixRequest, *, url: str, options: str) -> str:
    """Python code that makes the same mix and writes it to mix.wav."""
    part, spec = desk.part(mix), desk.spec
    opened = f"store = lm.open({url!r}{options})"
    end = [
        f"audio = store.decode_latent(mix, {part.samples})  # [channels, samples]",
        f'soundfile.write("mix.wav", audio.T, {spec.sample_rate}, subtype="FLOAT")',
    ]
    if not desk.chunked and (part.start or part.frames < part.total):
        end = [
            f"mix = mix[:, {part.start}:{part.start + part.frames}]  # the part that you hear",
            *end,
        ]
    if desk.codes:  # one record
        lines = ["import latentmill as lm", "import soundfile", "", opened]
        lines += [f"mix = store[{mix.channels[0].key!r}].latent", *end]
        return "\n".join(lines) + "\n"
    panned = any(channel.pan for channel in mix.channels)
    gains = [desk.gains(channel) if panned else channel.gain for channel in mix.channels]
    lines = ["import latentmill as lm", "import soundfile", ""]
    if panned:
        lines = ["import dataclasses", "", *lines[:1], "import numpy as np", *lines[1:]]
    lines += [opened, "origin = store.origin", "channels = ["]
    what = "key, (left gain, right gain), first frame" if panned else "key, gain, first frame"
    lines += [f"    # {what}"]
    for channel, gain in zip(mix.channels, gains, strict=True):
        lines += [f"    ({channel.key!r}, {gain!r}, {channel.offset}),"]
    lines += ["]"]
    if desk.chunked:
        lines += ["latents = [store[key].latent for key, _, _ in channels]"]
    else:
        lines += [
            "latents = [",
            f"    lm.fit(store[key].latent, {part.total}, offset=first, origin=origin)",
            "    for key, _, first in channels",
            "]",
        ]
    if panned:
        half = spec.latent_channels // 2
        lines += [
            "sides = []",
            f"for side, rows in enumerate((slice(0, {half}), slice({half}, None))):",
            "    silence = dataclasses.replace(origin, frames=origin.frames[rows])",
            "    gains = [gain[side] for _, gain, _ in channels]",
            "    sides.append(lm.mix([z[rows] for z in latents], gains, origin=silence))",
            "mix = np.concatenate(sides)",
        ]
    else:
        lines += ["mix = lm.mix(latents, [gain for _, gain, _ in channels], origin=origin)"]
    return "\n".join([*lines, *end]) + "\n"
