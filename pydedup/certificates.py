# SPDX-License-Identifier: Apache-2.0
"""Certificates in words: what was promised for a stored model, and how it was found out.

A certificate is the JSON object that is recorded with a model. Not here: making one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from pydedup import text
from pydedup.errors import CorruptStoreError

__all__ = [
    "ADDRESS",
    "ALIASES",
    "ARTIFACTS",
    "MAPS",
    "MEASURED",
    "METADATA",
    "OF_MODEL",
    "PAGES",
    "TENSORS",
    "artifact_digest",
    "describe",
    "error_of",
    "guards_nothing",
    "keeps_bits",
    "largest_error",
    "number_in",
    "rounding_of",
]

#: Where a certificate, as it is recorded, has the digests of the model's artifacts by name, and the
#: one of the names, dtypes and shapes of its tensors.
ARTIFACTS, TENSORS = "artifacts", "tensors"
#: Where it has what tells damage of block maps: `map_digest` of each tensor, one behind the other.
MAPS = "maps"
#: Where it has what tells that a page is in the place of another: `page_tags` of what it reads.
PAGES = "pages"
#: Where it has the ``name@version`` that the model was added as, and the digest of its metadata.
ADDRESS, METADATA = "address", "metadata"
#: Where it has the aliases that point at the model.
ALIASES = "aliases"
#: What is of the model, and not of what was promised for it.
OF_MODEL = (ARTIFACTS, TENSORS, MAPS, PAGES, ADDRESS, METADATA, ALIASES)
#: What all certificates say beside the parameters of the policy, which have other names.
MEASURED = ("policy", "same_bits", "largest_block_error", "tensor_errors", *OF_MODEL)

# Before certificates said so themselves.
_KEEP_BITS = ("exact", "lossless")


def keeps_bits(policy: str, certificate: Mapping[str, Any]) -> bool:
    """Return whether a model that was added under a policy is stored to the bit, by promise.

    A relative difference of 0 says less: zeros of another sign, and numbers whose squares
    underflow, differ by that.
    """
    return bool(certificate.get("same_bits", policy in _KEEP_BITS))


def artifact_digest(payload: bytes) -> str:
    """Return what names the content of an artifact, such as a graph or a tokenizer's file."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def largest_error(certificate: Mapping[str, Any]) -> float:
    """Return a bound on the relative L2 difference between a block and what is stored for it.

    It is the greatest one, unless a tensor was changed in part since another version: blocks that
    are kept from that are not compared again.
    """
    # Before deltas, without which there is none, it was not recorded.
    return number_in({"largest_block_error": 0.0, **certificate}, "largest_block_error")


def error_of(certificate: Mapping[str, Any], name: str) -> float:
    """Return that bound for the blocks of one tensor."""
    errors = certificate.get("tensor_errors")
    if errors is None:
        return largest_error(certificate)
    if not isinstance(errors, Mapping):
        raise _damaged(errors, "tensor_errors")
    return number_in(errors, name) if name in errors else 0.0


def number_in(certificate: Mapping[str, Any], name: str) -> float:
    """Return a number of a certificate. Raises CorruptStoreError where there is none."""
    try:
        return float(certificate[name])
    except (KeyError, TypeError, ValueError) as exc:
        raise _damaged(certificate.get(name, "nothing"), name) from exc


def rounding_of(metric: float) -> float:
    """Return how much is no drop: differences of rounded metrics (0.885 - 0.875) are not exact."""
    return 1e-12 * max(1.0, abs(metric))


def guards_nothing(certificate: Mapping[str, Any]) -> str | None:
    """Say why the metric of an `Accuracy` certificate may promise nothing; None if it seems to."""
    if certificate.get("zeros_ended_after") is not None:
        seconds = number_in(certificate, "zeros_ended_after")
        return (
            "whether the metric guards anything is not known: with zeros for all weights evaluate "
            f"did not end within {text.duration(seconds)}, and was ended; should it not end for "
            "some weights, give it a limit of its own"
        )
    if certificate.get("metric_of_zeros") is None:
        return None
    before, zeros, most = (
        number_in(certificate, name) for name in ("metric_before", "metric_of_zeros", "max_drop")
    )
    if before - zeros > most + rounding_of(before):
        return None
    return (
        f"the metric guards nothing: it is {before:.6g} for the model, and {zeros:.6g} with zeros "
        f"for all of its weights, which max_drop={most:g} allows too. Is evaluate given the right "
        "examples, and does it use the arrays that it gets? Else take a smaller max_drop, or "
        "Bounded, which needs no metric"
    )


def _damaged(found: object, name: str) -> CorruptStoreError:
    return CorruptStoreError(
        f"a certificate is damaged: it has {found!r:.60} as its {name}; restore a backup"
    )


def describe(certificate: Mapping[str, Any]) -> list[str]:
    """Return a certificate as lines of text; of a damaged one, what is wrong with it."""
    try:
        return _describe(certificate)
    except CorruptStoreError as exc:
        return [str(exc)]
    except (KeyError, TypeError, ValueError) as exc:
        return [f"the certificate is damaged ({type(exc).__name__}: {exc}); restore a backup"]


def _describe(certificate: Mapping[str, Any]) -> list[str]:
    if certificate.get("policy") == "accuracy":
        return _describe_accuracy(certificate)
    if keeps_bits(certificate.get("policy", "exact"), certificate):
        return ["the same bits"]
    largest = largest_error(certificate)
    if certificate.get("policy") == "bounded":
        promised = f"{certificate['max_rel_error']:g}"
        return [
            f"each block differs from the source by at most {promised} of its norm; "
            f"measured: by at most {text.at_most(largest)}"
        ]
    return [f"not the same bits: no block is farther away than {text.at_most(largest)} of its norm"]


def _describe_accuracy(certificate: Mapping[str, Any]) -> list[str]:
    """Return a certificate of the policy `Accuracy`."""
    confidence, rows, nothing = (
        certificate["confidence"],
        certificate["rows"],
        guards_nothing(certificate),
    )
    # Early certificates do not name score_range and max_rel_error.
    every, most = certificate["every"], certificate.get("max_rel_error")
    lines = [
        f"metric {certificate['metric_before']:.6g} before, {certificate['metric_after']:.6g} "
        f"after: a drop of {certificate['metric_drop']:.3g}, allowed {certificate['max_drop']:g}"
    ]
    if nothing is not None:
        lines.append(nothing)
    if confidence is not None:
        span = certificate.get("score_range")
        of_scores = "" if span is None else f", of scores from {span[0]:g} to {span[1]:g}"
        lines.append(
            f"drop at most {certificate['max_drop']:g} with confidence {confidence:g}{of_scores} "
            f"(bound {text.at_most(certificate['bound'])}; {rows['steering']:,} examples steered "
            f"the search, {rows['judging']:,} others judged)"
        )
    elif rows["all"] is not None:
        lines.append(f"on {rows['all']:,} examples; without confidence, so for these alone")
    replaced, shared = certificate["replaced"], certificate["shared"]
    lines.append(
        f"blocks replaced {replaced:,} of {certificate['blocks']:,} candidates "
        f"({shared:,} shared, {replaced - shared:,} as deltas), "
        f"refused {certificate['refused']:,}, not tried {certificate['untried']:,}; "
        f"no block changed by more than {text.at_most(largest_error(certificate))} of its norm"
    )
    lines.append(
        f"search {certificate['search']} by {certificate['order']}, "
        + ("" if every is None else f"every {text.plural(every, 'block')}, ")
        + ("" if most is None else f"replacements within {most:g}, ")
        + f"{certificate['evaluations']:,} of at most {certificate['max_evaluations']:,} "
        f"evaluations, seed {certificate['seed']}; ended since {certificate['ended']}"
    )
    if certificate["finetuned"]:
        lines.append("what is not shared was trained further afterwards")
    if certificate["noise"]:
        lines.append(f"evaluate varied by {certificate['noise']:.3g}, counted as part of the drop")
    return lines
