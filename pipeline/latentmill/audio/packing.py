"""Packs the frames of FFmpeg's decoders into blocks of floats."""

from __future__ import annotations

import av


class FramePacker:
    """Converts frames to packed floats of the same rate, in blocks of one size if `samples` is set.

    Unlike `av.AudioResampler`, it has no threads of its own. Those do not exist in a fork of the
    process, such as a worker of a DataLoader, which hangs when it frees the resampler.
    """

    def __init__(self, layout: av.AudioLayout, sample_rate: int, samples: int = 0) -> None:
        self._layout, self._rate, self._samples = layout, sample_rate, samples
        self._graph: av.filter.Graph | None = None
        self._kind: tuple[str, str, int] | None = None  # of the frames

    def push(self, frame: av.AudioFrame | None) -> list[av.AudioFrame]:
        """The blocks that are complete with this frame; all that is left, if it is None.

        Raises one of FFmpeg's errors, or ValueError if the kind of frames changes.
        """
        if self._graph is None:
            if frame is None:
                return []
            self._graph, self._kind = self._made(frame), _kind(frame)
        if frame is not None and _kind(frame) != self._kind:
            raise ValueError("the format of the samples changes within the file")
        self._graph.push(frame)
        blocks: list[av.AudioFrame] = []
        while True:
            try:
                block = self._graph.pull()
            except (EOFError, av.BlockingIOError):
                return blocks
            assert isinstance(block, av.AudioFrame)
            blocks.append(block)

    def _made(self, frame: av.AudioFrame) -> av.filter.Graph:
        sample_format, layout, rate = _kind(frame)
        time_base = {"time_base": str(frame.time_base)} if frame.time_base else {}
        graph = av.filter.Graph()
        graph.threads = 1
        source = graph.add(
            "abuffer",
            sample_rate=str(rate),
            sample_fmt=sample_format,
            channel_layout=layout,
            **time_base,
        )
        packed = graph.add(
            "aformat",
            sample_rates=str(self._rate),
            sample_fmts="flt",
            channel_layouts=self._layout.name,
        )
        sink = graph.add("abuffersink")
        source.link_to(packed)
        packed.link_to(sink)
        graph.configure()
        if self._samples:
            graph.set_audio_frame_size(self._samples)
        return graph


def _kind(frame: av.AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate
