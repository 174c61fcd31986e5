"""The options of a run as others may read them, and the command line that asks for them.

Paths are told by their last part, as where a machine keeps its files is nobody's business.
"""

import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

import safefolder
from safefolder.options import Options, is_given, option_fields
from vqvae.training.model_kinds import LATENTS, LIKELIHOODS, quantizer_name, quantizer_named, with_latents
from vqvae.training.options import LooksConfig, Run
from vqvae.training.presets import PRESETS, without_muon
from vqvae.training.prior_kinds import kind_of, with_kind

# What is the session's and not the run's, and what selects other options and is told before them.
_LEFT_OUT = ("preset", "run", "stage", "resume", "time_budget")
_KINDS = ("latents", "quantizer", "likelihood", "prior_kind")
_PATHS = ("data.source", "data.root", "tokenizer", "codes", "run")


def public_options(run: Run) -> list[tuple[str, str]]:
    """All options by their names on the command line, with their values."""
    names = [each.name for each in option_fields(Run) if each.name not in ("resume", "stage")]
    found = []
    for name in names:
        for key, value in _leaves(name, getattr(run, name)):
            found.append((key, " ".join(_words(key, value))))
    return found


def command_line(run: Run) -> str:
    """The command that trains such a run: its preset, and what is not as in the preset."""
    words = ["vqvae", "train", "--preset", run.preset, "--run", f"runs/{run.run.absolute().name}"]
    default = PRESETS[run.preset]
    if run.tokenizer is not None:
        words += ["--tokenizer", _public(run.tokenizer)]
        default = dataclasses.replace(default, model=run.model)  # which are the tokenizer's
    has_taken = run.tokenizer is not None and not (run.run / "state" / "codebook.ckpt").exists()
    if has_taken or run.codes is not None:  # a codebook that stays as it is
        words += ["--stage", "prior"]
        default = dataclasses.replace(default, looks=LooksConfig())
    default, kinds = _with_kinds(default, run)
    words += kinds
    for each in option_fields(Run):
        if each.name not in (*_LEFT_OUT, *_KINDS, "tokenizer"):
            words += _differences(each.name, getattr(run, each.name), getattr(default, each.name))
    return shlex.join(words)


def _with_kinds(default: Run, run: Run) -> tuple[Run, list[str]]:
    """The preset with the kinds of the run, as the command line makes it; and the words that select them."""
    words: list[str] = []
    model = default.model
    if run.model.owner is not model.owner and run.latents != default.latents:
        words += ["--latents", run.latents]
        model = with_latents(model, LATENTS[run.latents])
    quantizer = getattr(run.model, "quantizer", None)
    if quantizer is not None and quantizer_name(quantizer) != quantizer_name(model.quantizer):
        name = quantizer_name(quantizer)
        words += ["--quantizer", name]
        model = dataclasses.replace(model, quantizer=quantizer_named(name))
    if run.model.likelihood.owner is not model.likelihood.owner:
        name = run.model.likelihood.owner.__name__
        words += ["--likelihood", name]
        model = dataclasses.replace(model, likelihood=LIKELIHOODS[name].Config())
    kind = kind_of(run.prior)
    prior = with_kind(default.prior, kind, of_codes=run.latents == "codes")
    fit = default.prior_fit
    if kind != kind_of(default.prior):
        words += ["--prior-kind", kind]
    if kind != "Transformer" or run.strategy.startswith("fsdp"):
        fit = without_muon(fit)
    return dataclasses.replace(default, model=model, prior=prior, prior_fit=fit), words


def _differences(name: str, value: Any, default: Any) -> list[str]:
    """The words for what is not as it is by default."""
    if isinstance(value, Options) and isinstance(default, Options) and type(value) is type(default):
        words = []
        for each in option_fields(type(value)):
            if not is_given(type(value), each.name):
                inside = getattr(value, each.name), getattr(default, each.name)
                words += _differences(f"{name}.{each.name}", *inside)
        return words
    if value == default:
        return []
    if isinstance(value, bool):
        *path, last = _flag(name).split(".")
        return ["--" + ".".join([*path, last if value else f"no-{last}"])]
    return [f"--{_flag(name)}", *_words(name, value)]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, Options):
        yield name, value
        return
    for each in option_fields(type(value)):
        if not is_given(type(value), each.name):
            yield from _leaves(f"{name}.{each.name}", getattr(value, each.name))


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, tuple | list):
        return [str(each) for each in value]
    return [_public(str(value)) if name in _PATHS and value is not None else str(value)]


def _public(source: str) -> str:
    kind, name = ("hf:", source.removeprefix("hf:")) if source.startswith("hf:") else ("", source)
    return kind + safefolder.cards.public_name(name)
