"""The options of a run from the command line: those of a preset, or of a run that goes on, and what is given."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, cast

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from safefolder.configured import ConfiguredOptions, option_sentences
from safefolder.options import is_given, option_fields
from vqvae import Autoencoder, GaussianVAE, exits
from vqvae.tokens import CodeDataset
from vqvae.tokens.buckets import check_one_size
from vqvae.training.model_kinds import LATENTS, LIKELIHOODS, quantizer_name, quantizer_named, with_latents
from vqvae.training.options import LooksConfig, Run, load_run, program_name
from vqvae.training.presets import PRESETS, has_networks, without_muon
from vqvae.training.prior_kinds import PRIOR_KINDS, kind_of, with_kind


def parse(args: list[str]) -> Run:
    """The options: those of the preset (with --resume: those of the run), overridden by the command line's.

    What selects other defaults is read first; tyro reads everything, and writes the help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "run", "stage", "latents", "quantizer", "likelihood", "tokenizer", "codes", "strategy"):
        first.add_argument(f"--{name}")
    first.add_argument("--prior-kind", "--prior_kind")
    first.add_argument("--resume", action="store_true")
    given, _ = exits.parsed(lambda: first.parse_known_args(args))
    for name, kinds in (
        ("preset", PRESETS),
        ("likelihood", LIKELIHOODS),
        ("latents", LATENTS),
        ("prior_kind", PRIOR_KINDS),
    ):
        if (value := getattr(given, name)) is not None and value not in kinds:
            raise ValueError(f"unknown {name.replace('_', ' ')} {value!r}, expected one of {', '.join(kinds)}")
    preset = given.preset or "fashion-mini"
    folder = Path(given.run or f"runs/{preset}")
    default = dataclasses.replace(PRESETS[preset], preset=preset, run=folder)
    if given.stage in ("prior", "evaluate"):  # which have no use for terms for the eye, and refuse them
        default = dataclasses.replace(default, looks=LooksConfig())
    tokenizer: str | None = given.tokenizer
    if given.codes:
        check_one_size(Path(given.codes))
    if given.codes and tokenizer is None and not (folder / "codebook").exists():
        tokenizer = source_of(Path(given.codes))
    is_new = tokenizer is not None and not (folder / "state" / "run.json").exists()
    if given.codes:
        data = dataclasses.replace(default.data, source=images_of(Path(given.codes)))
        default = dataclasses.replace(default, data=data)
    goes_on = given.resume or (given.stage in ("prior", "evaluate") and not is_new)
    if not goes_on and not has_networks(default.looks):
        without = "by likelihood alone, without terms for the eye: for these, pip install 'vqvae-priors[looks]'"
        print(f"note: {preset} trains {without}", file=sys.stderr)
        default = dataclasses.replace(default, looks=LooksConfig())
    if goes_on:
        default = dataclasses.replace(load_run(folder), stage="all", time_budget=None)
    if tokenizer is not None:
        tokenizer = os.path.abspath(tokenizer) if Path(tokenizer).exists() else tokenizer
        if (folder / "codebook").exists() and (is_new or load_run(folder).tokenizer != tokenizer):
            raise ValueError(
                f"{folder} has a codebook of its own, got --tokenizer {tokenizer}: leave it out, or name another "
                "folder with --run"
            )
        if not goes_on:
            default = dataclasses.replace(default, model=_config_for(tokenizer, given.codes))
        default = dataclasses.replace(default, tokenizer=tokenizer)
    if given.latents:
        default = dataclasses.replace(default, model=with_latents(default.model, LATENTS[given.latents]))
    is_gaussian = default.model.owner is GaussianVAE
    if given.quantizer:
        if is_gaussian:
            raise ValueError(f"Gaussian latents have no quantizer, got --quantizer {given.quantizer}")
        default = _with_part(default, "quantizer", quantizer_named(given.quantizer))
    if given.likelihood:
        default = _with_part(default, "likelihood", LIKELIHOODS[given.likelihood].Config())
    kind = given.prior_kind or kind_of(default.prior)
    default = dataclasses.replace(default, prior=with_kind(default.prior, kind, of_codes=not is_gaussian))
    shared_out = (given.strategy or default.strategy).startswith("fsdp")
    if kind == "PixelCNN" or shared_out or (not goes_on and kind != "Transformer"):
        default = dataclasses.replace(default, prior_fit=without_muon(default.prior_fit))
    kinds: Any = {
        "latents": "gaussian" if is_gaussian else "codes",
        "quantizer": "none" if is_gaussian else quantizer_name(default.model.quantizer),
        "likelihood": default.model.likelihood.owner.__name__,
        "prior_kind": kind_of(default.prior),
    }
    default = dataclasses.replace(default, **kinds)
    registry = ConstructorRegistry()
    registry.struct_rule(_struct)
    with registry:
        # Flags in pairs, as a resumed run may have any on already.
        return exits.parsed(
            lambda: tyro.cli(Run, prog=program_name(), default=default, args=args, config=(tyro.conf.AvoidSubcommands,))
        )


def _struct(info: StructTypeInfo) -> StructConstructorSpec | None:
    """How tyro reads the options of a part: those of its default's kind that the data does not decide."""
    default = info.default
    if not isinstance(default, ConfiguredOptions):
        return None
    sentences = option_sentences(default.owner)
    fields = [
        StructFieldSpec(
            name=each.name,
            type=cast(type, each.type),
            default=getattr(default, each.name),
            helptext=sentences.get(each.name),
        )
        for each in option_fields(type(default))
        if not is_given(type(default), each.name)
    ]
    return StructConstructorSpec(lambda **values: dataclasses.replace(default, **values), tuple(fields))


def _with_part(run: Run, name: str, part: Any) -> Run:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **{name: part}))


def source_of(codes: Path) -> str:
    """Where the tokenizer of a tokenized set was read from."""
    source = CodeDataset(codes / "train").tokenizer.get("source")
    if source is None:
        raise ValueError(f"{codes} does not say where its tokenizer lies: name it with --tokenizer")
    return source


def images_of(codes: Path) -> str:
    """Where the images of a tokenized set lie; what no set is called where it does not say."""
    found = CodeDataset(codes / "train")
    return found.source or f"{found.source_name} (of which {codes} does not say where)"


def _config_for(tokenizer: str, codes: str | None) -> Autoencoder.Config:
    """The options of --tokenizer; of images of the size that a tokenized set was made of."""
    config = load_tokenizer(tokenizer, codes).config
    size = None if codes is None else image_size_of(Path(codes))
    return config if size is None else dataclasses.replace(config, image_size=size)


def image_size_of(codes: Path) -> Any:
    """The size of the images of a tokenized set; None where it does not say."""
    return CodeDataset(codes / "train").tokenizer["config"].get("image_size")


def load_tokenizer(source: str, codes: str | None) -> Autoencoder:
    """The model of --tokenizer, or that a tokenized set names."""
    try:
        return Autoencoder.from_pretrained(source)
    except ValueError as error:
        if codes is None:
            raise
        raise ValueError(f"the tokenizer of {codes} cannot be read, name it with --tokenizer: {error}") from error
