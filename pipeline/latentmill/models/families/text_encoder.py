"""The embedders `t5:REPO`, `text:REPO` and `clap:REPO` for texts: encoders of transformers.

C. Raffel and others, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", JMLR 2020 (T5); Y. Wu and others, "Large-scale Contrastive Language-Audio Pretraining
with Feature Fusion and Keyword-to-Caption Augmentation", ICASSP 2023 (CLAP).

Texts of a call are padded on the right for the network and the padding is removed from the result,
so a text has as many tokens as its tokenizer gives it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Value
from latentmill.models.checks import check_device, no_gradients
from latentmill.models.embedder import EmbedderSpec, Kind
from latentmill.models.families.transformers_files import (
    find_encoder,
    load_network,
    load_tokenizer,
    model_config,
)
from latentmill.models.weights import (
    LOAD_ERRORS,
    ModelFiles,
    does_not_load,
    find_again,
    import_package,
    parse_repo,
)
from latentmill.record import FloatArray
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

_log = get_logger("models")

Pool = Literal["none", "mean"]
T5_TYPES = ("t5", "mt5", "umt5")
MOST_TOKENS = 1 << 20  # tokenizers without a maximum have 1e30


@dataclass(frozen=True)
class TextFamily:
    """A family of text encoders.

    Attributes:
        name: The family's name.
        types: The `model_type`s of transformers that it contains; empty for all.
        class_of: Finds the network's class, from the package and the configuration.
        run: Runs the network on token ids and mask `[B, L]`: returns `[B, L, D]`, or `[B, D]`.
        dimensions: Reads D from the configuration.
        kind: What an array is.
    """

    name: str
    types: tuple[str, ...]
    class_of: Callable[[Any, Any], Any]
    run: Callable[[Any, Tensor, Tensor], Tensor]
    dimensions: Callable[[Any], int]
    kind: Kind = "tokens"


@dataclass(frozen=True)
class TextHandle:
    """A text encoder whose files are found and hashed."""

    spec: EmbedderSpec
    files: ModelFiles
    family: TextFamily
    options: Mapping[str, Value]

    def load(self, device: str) -> TextEncoder:
        name = self.spec.name
        chosen = check_device(name, device)
        files = find_again(name, self.files)
        package, _ = import_package(name, "transformers")
        config = model_config(name, files, *self.family.types)
        network = load_network(name, files, config, self.family.class_of(package, config))
        tokenizer = load_tokenizer(name, files)
        longest = _longest(name, config, network, tokenizer, self.options["max_tokens"])
        return TextEncoder(self, network.to(chosen), tokenizer, longest, chosen)


class TextEncoder:
    """A text encoder on one device; implements the protocol `Embedder`."""

    def __init__(
        self,
        handle: TextHandle,
        network: Any,
        tokenizer: Any,
        longest: int | None,
        device: torch.device,
    ) -> None:
        self.spec = handle.spec
        self._run = handle.family.run
        self._mean = handle.options["pool"] == "mean"
        self._network, self._tokenizer, self._device = network, tokenizer, device
        self._longest = longest

    @no_gradients
    def embed(self, values: Sequence[str]) -> list[FloatArray]:
        ids = self._ids(list(values)) if values else []
        lengths = [len(each) for each in ids]
        empty: FloatArray = torch.zeros(self.spec.dimensions, 0).numpy()
        arrays = [empty] * len(ids)
        present = [number for number, length in enumerate(lengths) if length]
        if not present:
            return arrays
        padding = self._tokenizer.pad_token_id or 0
        width = max(lengths)
        padded = torch.tensor([ids[n] + [padding] * (width - lengths[n]) for n in present])
        mask = torch.tensor([[1] * lengths[n] + [0] * (width - lengths[n]) for n in present])
        states = self._run(self._network, padded.to(self._device), mask.to(self._device))
        states = states.float().cpu()
        for state, number in zip(states, present, strict=True):
            if self.spec.kind == "tokens" or self._mean:
                state = state[: lengths[number]].T  # noqa: PLW2901
                state = state.mean(1) if self._mean else state  # noqa: PLW2901
            arrays[number] = state.reshape(self.spec.dimensions, -1).numpy()
        return arrays

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text, alone. Warns of texts that are truncated."""
        ids: list[list[int]] = self._tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        longer = [n for n, each in enumerate(ids) if self._longest and len(each) > self._longest]
        if longer:
            _log.warning(
                "%s: the end is left out of %s with more than %s (option max_tokens)",
                self.spec.name,
                counted(len(longer), "text"),
                counted(self._longest or 0, "token"),
            )
            cut = self._tokenizer(
                [texts[n] for n in longer], truncation=True, max_length=self._longest
            )["input_ids"]
            for number, each in zip(longer, cut, strict=True):
                if self._longest and not 0 < len(each) <= self._longest:
                    raise ModelError(
                        f"Model {self.spec.name}: a text cannot be truncated to "
                        f"{counted(self._longest, 'token')}, because of the tokens that its "
                        "tokenizer adds: use a larger max_tokens."
                    )
                ids[number] = each
        return ids


def _longest(
    name: str, config: Any, network: torch.nn.Module, tokenizer: Any, asked: Value
) -> int | None:
    """Maximum number of tokens; None if nothing limits it.

    That is what the user asks for. Otherwise it is the smaller one of the tokenizer's maximum and
    the model's positions. T5 has relative positions, so it takes more tokens than the 512 of its
    tokenizers.

    Raises:
        ModelError: The user asks for more tokens than the model has positions.
    """
    limits = [tokenizer.model_max_length]
    positions = getattr(getattr(config, "text_config", config), "max_position_embeddings", None)
    if isinstance(positions, int):
        # RoBERTa and others count positions from the one after that of padding.
        first = max(
            (
                module.padding_idx + 1
                for name, module in network.named_modules()
                if name.endswith("position_embeddings")
                and isinstance(module, torch.nn.Embedding)
                and module.padding_idx is not None
            ),
            default=0,
        )
        limits.append(positions - first)
        if isinstance(asked, int) and asked > positions - first:
            raise ModelError(
                f"Model {name} has positions for {counted(positions - first, 'token')}, but option "
                f"max_tokens is {asked}: use at most {positions - first}."
            )
    if isinstance(asked, int):
        return asked
    return min((int(n) for n in limits if isinstance(n, int) and n < MOST_TOKENS), default=None)


def build_text(
    family: TextFamily,
    repo: str,
    *,
    revision: str | None = None,
    max_tokens: int | None = None,
    pool: Pool = "none",
) -> TextHandle:
    """Find a text encoder's files and make its handle; docs/models.md describes the options."""
    name = f"{family.name}:{repo}"
    if max_tokens is not None and max_tokens < 1:
        raise ModelError(f"Model {name}: option max_tokens must be positive, not {max_tokens}.")
    package, version = import_package(name, "transformers")
    files = find_encoder(name, parse_repo(name, repo, revision), {}, tokenizer=True)
    config = model_config(name, files, *family.types)
    options: dict[str, Value] = {"max_tokens": max_tokens, "pool": pool}
    try:
        family.class_of(package, config)
        dimensions = int(family.dimensions(config))
    except LOAD_ERRORS as error:
        raise does_not_load(name, files.paths["config"], error) from error
    spec = EmbedderSpec(
        name=family.name,
        kind="vector" if pool == "mean" else family.kind,
        input="text",
        dimensions=dimensions,
        identity={
            "package": "transformers",
            "package_version": version,
            **{option: value for option, value in options.items() if value not in (None, "none")},
            **files.identity,
        },
        provenance=files.provenance,
    )
    return TextHandle(spec, files, family, options)


def _encoder_class(package: Any, config: Any) -> Any:
    """The class of the encoder alone if there is one; raises ValueError for other models."""
    for mapping in (package.MODEL_FOR_TEXT_ENCODING_MAPPING, package.MODEL_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ValueError(f"transformers has no text encoder for {config.model_type}")


def _hidden_states(network: Any, ids: Tensor, mask: Tensor) -> Tensor:
    if network.config.is_encoder_decoder and hasattr(network, "get_encoder"):
        network = network.get_encoder()
    states: Tensor = network(input_ids=ids, attention_mask=mask).last_hidden_state
    return states


def _clap_vectors(network: Any, ids: Tensor, mask: Tensor) -> Tensor:
    vectors: Tensor = network.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    return vectors


def _clap_class(package: Any, config: Any) -> Any:
    del config
    return package.ClapModel


def _hidden_size(config: Any) -> int:
    return int(config.hidden_size)


def _projection_size(config: Any) -> int:
    return int(config.projection_dim)


_T5 = TextFamily("t5", T5_TYPES, _encoder_class, _hidden_states, _hidden_size)
_TEXT = TextFamily("text", (), _encoder_class, _hidden_states, _hidden_size)
_CLAP = TextFamily("clap", ("clap",), _clap_class, _clap_vectors, _projection_size, "vector")


def build_t5(
    repo: str, *, revision: str | None = None, max_tokens: int | None = None
) -> TextHandle:
    """`t5:REPO`: all hidden states of the encoder of T5, mT5 or umT5."""
    return build_text(_T5, repo, revision=revision, max_tokens=max_tokens)


def build_clap(
    repo: str, *, revision: str | None = None, max_tokens: int | None = None
) -> TextHandle:
    """`clap:REPO`: the projected vector of a text, of length 1."""
    return build_text(_CLAP, repo, revision=revision, max_tokens=max_tokens)


build = partial(build_text, _TEXT)
