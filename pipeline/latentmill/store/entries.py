"""Parts of dataset.json, and the types of values in the documents of a store."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from latentmill.storage.storage import file_in_store

Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(ge=0, lt=2**31)]
NameInStore = Annotated[str, AfterValidator(file_in_store)]


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShardEntry(Document):
    """A shard of a sealed store."""

    path: NameInStore
    rows: int
    bytes: int
    hash: str


class AnnotationEntry(Document):
    """Annotations of a store: annotations/VERSION.parquet, such as annotations/0003.parquet."""

    version: int = Field(ge=1, lt=10**9)
    hashes: list[str] = Field(
        description="xxh3-128 of the bytes of each version's file, from version 1, hex."
    )
    records: int
    names: list[str] = Field(description="Names of the annotated values.")
    refreshed: list[int] = Field(
        [],
        description="Versions whose new values come from the source (`--refresh-metadata`) or, of "
        "a view, from its bases; entries without such versions have no such field.",
    )

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        document: dict[str, Any] = write(self)
        if not self.refreshed:
            del document["refreshed"]
        return document

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.hashes) != self.version:
            raise ValueError("the hashes are not those of all versions")
        if not all(1 <= version <= self.version for version in self.refreshed):
            raise ValueError("a refreshed version does not exist")
        return self


class BaseEntry(Document):
    """A base store of a view."""

    url: str
    fingerprint: str
    index_hash: str | None = Field(
        description="Hash of the store's index that the view's index has its positions from."
    )
    prefix: str = Field("", description="What the view's keys of this store begin with.")
    records: Bytes
