"""Which column of a table holds images, and what the one of labels says.

Images: structs {bytes, path}, or plain binary. Labels: a column of class labels by the Hugging Face schema, or one that
is called "label" or "labels", in small letters or capitals; whole numbers, or text, which are names of classes.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.types as kinds

from vqvae.data.labels import NONE, UNUSABLE, Classes, Given, class_name

LABEL_COLUMNS = ("label", "labels")

# A column of a table, or of a file, by its name.
ReadColumn = Callable[[str], pyarrow.ChunkedArray]


def image_column(schema: pyarrow.Schema, name: str) -> str:
    """The column of images. Raises ValueError where there is none."""
    noted = {each for each, feature in _features(schema).items() if feature["_type"] == "Image"}
    fitting = [field.name for field in schema if holds_bytes(field.type)]
    structs = [each for each in fitting if kinds.is_struct(schema.field(each).type)]
    for choice in ([each for each in fitting if each in noted], structs, fitting):
        if choice:
            return "image" if "image" in choice else choice[0]
    found = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    raise ValueError(
        f"{name} has no column of encoded images; columns: {found}; expected one of "
        "struct<bytes: binary, path: string> or binary"
    )


def holds_bytes(kind: pyarrow.DataType) -> bool:
    """Whether a column of this type may hold encoded images."""
    if kinds.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        # Where all rows name files there are no bytes to tell a type from.
        return "bytes" in fields and (
            _is_binary(fields["bytes"]) or (kinds.is_null(fields["bytes"]) and "path" in fields)
        )
    return _is_binary(kind)


def _is_binary(kind: pyarrow.DataType) -> bool:
    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)


def label_column(schemas: Iterable[pyarrow.Schema], image: str) -> str | None:
    """The name of the column of labels, one that can be used if there is such a one."""
    found: dict[str, bool] = {}
    for schema in schemas:
        noted = [each for each, feature in _features(schema).items() if feature["_type"] == "ClassLabel"]
        named = [each for name in LABEL_COLUMNS for each in schema.names if each.casefold() == name]
        for each in (*noted, *named):
            if each != image and schema.names.count(each) == 1:
                found[each] = found.get(each, False) or _is_label(schema.field(each).type)
    return next((each for each, usable in found.items() if usable), next(iter(found), None))


def given_labels(schema: pyarrow.Schema, column: str, num_rows: int, read: ReadColumn) -> Given:
    """What the column of labels of one table or file says; nothing where it has none."""
    if schema.names.count(column) != 1 or kinds.is_null(kind := schema.field(column).type):
        return Given(codes=np.full(num_rows, NONE, np.int64))
    if not _is_label(kind):
        return Given(
            codes=np.full(num_rows, UNUSABLE, np.int64),
            unusable=f"the column {column} is of {kind}, expected whole numbers or text",
        )
    values = read(column)
    if kinds.is_dictionary(kind):
        values = values.cast(kind.value_type)
    if kinds.is_integer(values.type):
        numbers = values.fill_null(0).to_numpy()
        known = values.is_valid().to_numpy()
        if numbers.dtype == np.uint64:
            numbers = np.minimum(numbers, np.uint64(np.iinfo(np.int64).max))
        numbers = numbers.astype(np.int64)
        codes = np.where(known, np.where(numbers < NONE, UNUSABLE, numbers), NONE)
        return Given(
            codes=codes, unusable=f"the column {column} has numbers below 0, down to {numbers.min(initial=0):,}"
        )
    binary = pyarrow.large_binary() if kinds.is_large_string(values.type) else pyarrow.binary()
    if kinds.is_string_view(values.type):
        values = values.cast(pyarrow.string())
    encoded = values.cast(binary).dictionary_encode().combine_chunks()
    names = [class_name(each) for each in encoded.dictionary.to_pylist()]
    # An empty name is none, as no row is.
    words = [UNUSABLE if name is None else name or None for name in names] + [None]
    places = encoded.indices.fill_null(len(names)).to_numpy()
    return replace(Given.of(words).at(places), unusable=f"in the column {column} are texts that can be no names")


def _is_label(kind: pyarrow.DataType) -> bool:
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return kinds.is_integer(kind) or kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def with_names(classes: Classes, schema: pyarrow.Schema, column: str) -> Classes:
    """With the names that the Hugging Face schema has for numbers."""
    names = _features(schema).get(column, {}).get("names")
    if classes.num_classes is None or classes.class_names is not None or not isinstance(names, list):
        return classes
    if not all(isinstance(name, str) for name in names):
        return replace(classes, note=f"the names of classes in the column {column} are no text: no names are used")
    if len(names) < classes.num_classes:
        return replace(
            classes,
            note=f"labels go up to {classes.num_classes - 1:,}, and the column {column} has names for {len(names):,} "
            "classes: no names are used",
        )
    return replace(classes, num_classes=len(names), class_names=tuple(names))


def _features(schema: pyarrow.Schema) -> dict[str, dict]:
    """What Hugging Face notes of each column beside the schema; empty for other files."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        features = note["info"]["features"].items()
        return {name: each for name, each in features if isinstance(each, dict) and "_type" in each}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}
