"""File formats of the results of an evaluation: evaluation/NAME.json."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

VECTORS_FILE = r"evaluation/vectors\.[0-9a-f]{16}\.npy"  # named by the hash of its bytes


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SeamEntry(_Result):
    """Error that chunking introduces, per item: ||stitched - whole|| / ||whole||."""

    items: int = Field(description="Number of items compared.")
    median: float
    largest: float


Metric = Literal[
    "reconstruction",
    "encoder_homogeneity",
    "decoder_homogeneity",
    "encoder_additivity",
    "decoder_additivity",
    "encoder_composition",
    "decoder_composition",
    "separation",
    "removal",
    "mix_rate",
]
Form = Literal["origin", "raw", "twice", "reconstruction", "unchanged", "mix"]
Noise = Literal["shared", "independent"]


class ScoreEntry(_Result):
    """One metric of the linearity card: its values over all tracks, their median and mean."""

    metric: Metric
    measure: str = Field(
        description="relative_l2; snr, si_sdr and level in dB; mr_stft; log_mel in dB; mix_rate: "
        "the ratio of two mr_stft."
    )
    against: str = Field(
        description="What the result is compared with: encoded (latents), decoded (the decoded "
        "latent of the target), sum (the sum of decoded sounds) or audio (the target itself)."
    )
    form: Form = Field(
        description="origin or raw: arithmetic with or without the origin. Bounds: twice (the "
        "target's latent, decoded with other noise), reconstruction (the target's latent, "
        "decoded), unchanged (no arithmetic: the sound before it, or the mixture)."
    )
    noise: Noise | None = Field(
        None, description="Noise of the two decodings; null if there is one, or none has noise."
    )
    gain: float | None = None
    median: float
    mean: float
    low: float = Field(description="95 % bootstrap interval of the median, over tracks.")
    high: float
    tracks: int
    values: list[float]


class LinearityEntry(_Result):
    """Linearity of the model on the store's audio: the main errors, and all scores.

    The main errors are medians; each is divided by the norm of its target minus the origin,
    ||t - E(0)||. Results of earlier versions have only these.
    """

    items: int = Field(description="Number of sounds scaled by each gain.")
    pairs: int = Field(description="Number of pairs of sounds added.")
    homogeneity: float = Field(description="E(a x) against a E(x) + (1 - a) E(0).")
    homogeneity_raw: float = Field(description="E(a x) against a E(x).")
    additivity: float = Field(description="E(x) + E(y) - E(0) against E(x + y).")
    additivity_raw: float = Field(description="E(x) + E(y) against E(x + y).")
    by_gain: dict[str, float] = Field(description="Homogeneity error by gain a.")
    homogeneity_mean: float | None = Field(None, description="Mean of the homogeneity errors.")
    additivity_mean: float | None = Field(None, description="Mean of the additivity errors.")
    homogeneity_raw_norm: float | None = Field(
        None,
        description="homogeneity (with the origin), divided by ||t|| instead of ||t - E(0)||; "
        "small if the origin is large. In results without this value, all errors are divided by "
        "||t||.",
    )
    additivity_raw_norm: float | None = Field(
        None, description="additivity (with the origin), divided by ||t|| instead of ||t - E(0)||."
    )
    removal: float | None = Field(
        None, description="SI-SDR in dB of D(E(mix) - E(s) + E(0)) against D(E(mix - s))."
    )
    removal_raw: float | None = Field(
        None, description="SI-SDR in dB of D(E(mix) - E(s)) against D(E(mix - s))."
    )
    protocol: Literal["latentmill", "linear-cae"] = Field(
        "latentmill",
        description="linear-cae: the protocol of its authors; the main errors are then without "
        "the origin, and divided by ||t||.",
    )
    grouped: bool = Field(False, description="Whether the tracks are stem groups, or pairs.")
    seconds: float | None = Field(None, description="Length that was used of each track at most.")
    tracks: list[str] = Field([], description="Groups, or keys of pairs.")
    silent: int = Field(0, description="Stems and targets that were too quiet to be scored.")
    scores: list[ScoreEntry] = []


class ItemQuality(_Result):
    """Quality of one reconstructed item."""

    key: str
    seconds: float = Field(description="Length that was compared.")
    snr: float = Field(description="dB.")
    si_sdr: float = Field(description="dB.")
    level: float = Field(description="Level error in dB.")
    mr_stft: float = Field(description="Multi-resolution STFT distance.")
    log_mel: float = Field(description="Log-mel distance in dB.")


class SummaryEntry(_Result):
    """Distribution of a value over items."""

    mean: float
    median: float
    low: float = Field(description="Smallest value.")
    high: float = Field(description="Largest value.")


class ReconstructionEntry(_Result):
    """Decoded records, compared with their source audio."""

    items: list[ItemQuality]
    summary: dict[str, SummaryEntry] = Field(description="By measure, over the items.")
    worst: list[str] = Field(description="Keys with the largest mr_stft, the largest first.")
    silent: int = Field(description="Items below -50 dBFS, which are not compared.")
    without_source: dict[str, int] = Field(
        description="Number of items that could not be compared, by reason."
    )


class NearDuplicates(_Result):
    """Records whose latents are almost equal."""

    keys: list[str]
    distance: float = Field(description="Largest cosine distance of pooled latents.")


class Outlier(_Result):
    """A record whose latents are unlike the others."""

    key: str
    distance: float = Field(description="Distance from the middle; 1 is that of a usual record.")


class PooledVectors(_Result):
    """File with a short vector for each record, for `latentmill neighbours`."""

    file: str = Field(
        pattern=f"^{VECTORS_FILE}$",
        description="float16 [records, 64 + length of mean], in the order of the index.",
    )
    mean: list[float] = Field(
        min_length=1, max_length=64, description="Mean spectral shape of the records."
    )
    hash: str = Field(description="xxh3-128 of the file's bytes, hex.")


_TOTALS = {
    "same_file": "same_file_groups",
    "same_audio": "same_audio_groups",
    "near_duplicates": "near_duplicate_groups",
    "outliers": "outlier_records",
}


class StoreStatistics(_Result):
    """Contents of a store. Lists of keys have at most 1,000 entries, the totals count all.

    In results of earlier versions, which have no totals of groups and outliers, they are the
    lengths of the lists.
    """

    records: int
    hours: float
    frames: int
    mean: list[float] = Field(description="By channel, as are the next four.")
    std: list[float]
    low: list[float]
    high: list[float]
    saturation: list[float] = Field(
        description="Share of the frames with the largest or smallest value of the channel."
    )
    saturated_channels: list[int] = Field(
        description="Channels with a saturation over 1 %, without one largest and one smallest."
    )
    constant_channels: list[int]
    deviations: int = Field(
        0,
        ge=0,
        description="Number of the channels, at the end, that are standard deviations of the "
        "others. They do not count for effective_rank and suggested_scale.",
    )
    effective_rank: float = Field(description="exp(entropy of the covariance's eigenvalues).")
    autocorrelation: dict[str, list[float]] = Field(description="By distance in frames.")
    suggested_scale: float | None = Field(
        None, description="Factor that gives the stored latents a standard deviation of 1."
    )
    seconds: dict[str, float] = Field(description="Quantiles of the duration.")
    rms_db: dict[str, float] = Field(description="Quantiles of the RMS, dBFS, without silence.")
    lufs: dict[str, float] | None = Field(
        None, description="Quantiles of the integrated loudness, of a sample of the records."
    )
    lufs_records: int
    sample_rates: dict[str, int]
    source_channels: dict[str, int]
    formats: dict[str, int] = Field(description="By the extension of the source.")
    silence: float = Field(description="Share of the frames below -60 dBFS.")
    silent: list[str] = Field(description="Records that are below -60 dBFS all the time.")
    silent_records: int
    same_file: list[list[str]] = Field(description="Records of equal files, by content hash.")
    same_file_groups: int
    same_audio: list[list[str]] = Field(description="Records of equal audio in other files.")
    same_audio_groups: int
    near_duplicates: list[NearDuplicates] = Field(
        description="The same sound encoded again, or with another gain."
    )
    near_duplicate_groups: int
    outliers: list[Outlier]
    outlier_records: int
    vectors: PooledVectors | None = Field(
        None, description="Pooled latents. Results of earlier versions do not have them."
    )

    @model_validator(mode="before")
    @classmethod
    def _count_listed(cls, values: Any) -> Any:
        """Add the totals that results of earlier versions do not have."""
        if not isinstance(values, dict):
            return values
        listed = {total: values.get(name) for name, total in _TOTALS.items()}
        counts = {total: len(keys) for total, keys in listed.items() if isinstance(keys, list)}
        return {**counts, **values}

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        """Raise ValueError if lists by channel differ in length, or a distance is not a number."""
        by_lag = self.autocorrelation
        lists = [self.std, self.low, self.high, self.saturation, *filter(None, by_lag.values())]
        if any(len(values) != len(self.mean) for values in lists):
            raise ValueError("the lists have values of different numbers of channels")
        if not all(re.fullmatch("[1-9][0-9]{0,8}", lag) for lag in by_lag):
            raise ValueError("a distance of the autocorrelation is not a number of frames")
        return self


ModelOption = str | int | float | bool | None


class Measurement(_Result):
    """A result measured on the audio of a store: evaluation/NAME.json."""

    format_version: Literal[1] = 1
    latentmill_version: str
    fingerprint: str = Field(description="Fingerprint of the store.")
    seal: str | None = Field(description="Seal of the store when it was measured.")
    model_options: dict[str, ModelOption] | None = Field(
        None, description="Options of the model that differ from those in the store."
    )
    seams: SeamEntry | None = Field(None, description="Error at the seams of chunks.")
    linearity: LinearityEntry | None = Field(None, description="Error of latent arithmetic.")
    reconstruction: ReconstructionEntry | None = Field(None, description="Quality of decoding.")
    statistics: StoreStatistics | None = Field(None, description="Contents of the store.")
