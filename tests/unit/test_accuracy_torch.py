# SPDX-License-Identifier: Apache-2.0
"""The accuracy policy on torch modules, trained on real handwritten digits.

The data set is the one that scikit-learn carries: 1,797 images of 8x8, from the UCI repository.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pydedup.accuracy import Accuracy
from pydedup.errors import ArgumentError, EvaluationError
from pydedup.ingest.accuracy import Choice, Replacement, choose
from pydedup.training import torch_evaluate, torch_finetune, torch_saliency

torch = pytest.importorskip("torch")
nn = torch.nn
functional = torch.nn.functional

_BLOCK = 8


class Digits:
    """Three parts of the images: to train on, to validate on, and held out."""

    def __init__(self) -> None:
        sklearn = pytest.importorskip("sklearn.datasets")
        images, labels = sklearn.load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        x = torch.from_numpy((images[order] / 16).astype(np.float32))
        y = torch.from_numpy(labels[order])
        self.train, self.valid, self.held_out = (
            (x[part], y[part]) for part in (slice(0, 700), slice(700, 1250), slice(1250, None))
        )


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers as small as these wait more for a second thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mlp() -> torch.nn.Module:
    return nn.Sequential(
        nn.Linear(64, 96),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(96, 96),
        nn.ReLU(),
        nn.Linear(96, 10),
    )


def cnn() -> torch.nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def fit(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, rate: float) -> None:
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(module.parameters(), rate)
    module.train()
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,))
        optimiser.zero_grad()
        functional.cross_entropy(module(x[rows]), y[rows]).backward()
        optimiser.step()
    module.eval()


def scores(part: tuple[torch.Tensor, torch.Tensor]) -> Callable[[torch.nn.Module], Any]:
    return lambda module: (module(part[0]).argmax(1) == part[1]).float()


def arrays(module: torch.nn.Module) -> dict[str, NDArray[Any]]:
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def replacements(new: dict[str, NDArray[Any]], base: dict[str, NDArray[Any]]) -> list[Replacement]:
    """Each block of a matrix or kernel: the base's block, or half-way, or nearly its own."""
    found = []
    for name, array in new.items():
        if array.ndim < 2:
            continue
        matrix, other = (a.reshape(len(a), -1) for a in (array.copy(), base[name]))
        for r in range(0, matrix.shape[0], _BLOCK):
            for c in range(0, matrix.shape[1], _BLOCK):
                own, theirs = (m[r : r + _BLOCK, c : c + _BLOCK] for m in (matrix, other))
                found.append(
                    Replacement(
                        name,
                        slice(r, r + own.shape[0]),
                        slice(c, c + own.shape[1]),
                        tuple(
                            lambda own=own, theirs=theirs, part=part: (
                                theirs + np.float32(part) * (own - theirs)
                            )
                            for part in (0.0, 0.5, 0.98)
                        ),
                        (256, 220, 180),
                        float(np.quantile(np.abs(own), 0.75) / np.abs(matrix).max()),
                        array.nbytes,
                    )
                )
    return found


@pytest.fixture(scope="module", params=[mlp, cnn])
def family(request: Any, digits: Digits) -> tuple[torch.nn.Module, list[dict[str, Any]]]:
    """A base trained on the digits below 5, and two variants that learn all of them from it."""
    torch.manual_seed(1)
    module = request.param()
    x, y = digits.train
    few = y < 5
    fit(module, x[few], y[few], 200, 0.003)
    base = arrays(module)
    variants = []
    for half in (slice(0, 350), slice(350, 700)):
        module.load_state_dict({name: torch.from_numpy(a) for name, a in base.items()})
        fit(module, x[half], y[half], 300, 0.002)
        variants.append(arrays(module))
    return module, [base, *variants]


@pytest.mark.parametrize("search", ["bisect", "step", "halving"])
@pytest.mark.parametrize("order", ["magnitude", "saliency"])
def test_variants_share_what_the_tolerance_allows(
    family: tuple[torch.nn.Module, list[dict[str, Any]]], digits: Digits, order: str, search: str
) -> None:
    module, (base, *variants) = family
    x, y = digits.train
    for variant in variants:
        weights = {name: array.copy() for name, array in variant.items()}
        evaluate = torch_evaluate(module, scores(digits.valid))
        before = float(np.mean(evaluate(weights)))
        assert before > 0.85
        saliency = torch_saliency(module, lambda m: functional.cross_entropy(m(x), y))
        policy = Accuracy(
            evaluate,
            0.02,
            order=order,  # type: ignore[arg-type]
            search=search,  # type: ignore[arg-type]
            saliency=saliency if order == "saliency" else None,
        )
        choice = choose(weights, replacements(variant, base), policy)
        certificate = choice.certificate
        assert certificate["metric_before"] == pytest.approx(before)
        # What is left in the arrays is what was certified, evaluated anew.
        assert float(np.mean(evaluate(weights))) == pytest.approx(certificate["metric_after"])
        assert certificate["metric_drop"] <= 0.02 + 1e-12
        assert certificate["untried"] == 0
        shared, *deltas = certificate["levels"]
        assert shared > 0
        assert sum(deltas) + shared == len(choice.levels)


def test_confidence_on_real_scores(
    family: tuple[torch.nn.Module, list[dict[str, Any]]], digits: Digits
) -> None:
    module, (base, variant, _) = family
    weights = {name: array.copy() for name, array in variant.items()}
    evaluate = torch_evaluate(module, scores(digits.valid))
    policy = Accuracy(evaluate, 0.05, confidence=0.95)
    choice = choose(weights, replacements(variant, base), policy)
    certificate = choice.certificate
    assert certificate["replaced"] > 0
    assert certificate["bound"] <= 0.05
    held_out = torch_evaluate(module, scores(digits.held_out))
    assert np.mean(held_out(variant)) - np.mean(held_out(weights)) <= 0.05


def test_finetuning_lets_more_be_shared(digits: Digits) -> None:
    torch.manual_seed(1)
    module = mlp()
    x, y = digits.train
    few = y < 5
    fit(module, x[few], y[few], 200, 0.003)
    base = arrays(module)
    fit(module, x, y, 300, 0.002)
    variant = arrays(module)

    def share(**options: Any) -> tuple[Choice, dict[str, NDArray[Any]]]:
        weights = {name: array.copy() for name, array in variant.items()}
        shares = [
            Replacement(r.tensor, r.rows, r.cols, r.levels[:1], r.saved[:1], r.magnitude, 1)
            for r in replacements(variant, base)
        ]
        evaluate = torch_evaluate(module, scores(digits.valid))
        return choose(weights, shares, Accuracy(evaluate, 0.01, **options)), weights

    optimiser = torch.optim.AdamW(module.parameters(), 0.002)

    def train(trained: torch.nn.Module, _: int) -> None:
        optimiser.zero_grad()
        functional.cross_entropy(trained(x), y).backward()
        optimiser.step()

    plain, _ = share()
    tuned, weights = share(finetune=torch_finetune(module, train, steps=30))
    assert tuned.certificate["metric_drop"] <= 0.01 + 1e-12
    assert tuned.finetuned
    assert tuned.certificate["replaced"] > plain.certificate["replaced"]
    for replacement, level in zip(replacements(variant, base), tuned.levels, strict=True):
        if level == 0:  # the base's bits, whatever the training did
            there = weights[replacement.tensor][replacement.rows, replacement.cols]
            assert np.array_equal(there, replacement.levels[0]())


# ---- the helpers --------------------------------------------------------------------------------


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def test_evaluate_leaves_the_module_as_it_was() -> None:
    module = small().train()
    module[1].eval()
    before, x = arrays(module), torch.randn(5, 3)
    other = {name: array + 1 for name, array in before.items()}
    seen: list[bool] = []

    def fn(m: torch.nn.Module) -> torch.Tensor:
        seen.extend((m.training, torch.is_grad_enabled(), bool((m[0].bias == before_bias).all())))
        return m(x).flatten()

    before_bias = module[0].bias.detach().clone()
    evaluate = torch_evaluate(module, fn)
    first, second = evaluate(other), evaluate(other)
    assert isinstance(first, np.ndarray)
    assert first.shape == (5,)
    assert np.array_equal(first, second)
    assert seen == [False, False, False] * 2
    for name, array in arrays(module).items():
        assert np.array_equal(array, before[name])
    assert [part.training for part in module.modules()] == [True, True, False, True, True]


def train_whole(module: torch.nn.Module) -> Any:
    return module.train()(torch.ones(2, 3)).mean()


def train_part(module: torch.nn.Module) -> Any:
    module[2].train()
    return module(torch.ones(2, 3)).mean()


def train_in_between(module: torch.nn.Module) -> Any:
    module.train()
    value = module[3](module[0](torch.ones(2, 3))).mean()
    module.eval()
    return value


def train_afterwards(module: torch.nn.Module) -> Any:
    value = module(torch.ones(2, 3)).mean()
    module.train()
    return value


@pytest.mark.parametrize("fn", [train_whole, train_part, train_in_between, train_afterwards])
def test_training_mode_is_refused_and_undone(fn: Callable[[torch.nn.Module], Any]) -> None:
    module = small().eval()
    before = arrays(module)
    with pytest.raises(EvaluationError, match="training mode"):
        torch_evaluate(module, fn)(before)
    assert not any(part.training for part in module.modules())
    assert all(np.array_equal(array, before[name]) for name, array in arrays(module).items())
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"9.weight": np.zeros((4, 3), np.float32)}, "no tensor '9.weight'"),
        ({"0.weight": np.zeros((3, 4), np.float32)}, r"\(3, 4\), but the module"),
        ({"0.weight": np.zeros((4, 3), np.float64)}, "float64"),
    ],
)
def test_arrays_must_be_the_module_s(change: dict[str, NDArray[Any]], said: str) -> None:
    module = small()
    with pytest.raises(ArgumentError, match=said):
        torch_evaluate(module, lambda m: 1.0)({**arrays(module), **change})


def test_half_precision_goes_in_and_out_bit_for_bit() -> None:
    import ml_dtypes

    module = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    weights = {"weight": np.array([[0.1, -2], [np.nan, 3e30]], ml_dtypes.bfloat16)}
    weights["weight"].flags.writeable = False
    seen = []
    torch_evaluate(module, lambda m: seen.append(m.weight.float().numpy().copy()) or 0.0)(weights)
    assert np.array_equal(seen[0], weights["weight"].astype(np.float32), equal_nan=True)
    tuned = torch_finetune(module, lambda m, _: m.weight.data.add_(1), steps=2)(
        weights, {"weight": np.array([[True, False], [True, False]])}
    )["weight"]
    assert tuned.dtype == ml_dtypes.bfloat16
    assert np.array_equal(tuned.view("u2")[:, 0], weights["weight"].view("u2")[:, 0])
    assert tuned[0, 1] == 0


def test_saliency_is_the_product_of_gradient_and_weight() -> None:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[3.0, -1.0]]))
    x = torch.tensor([[2.0, 5.0]])
    found = torch_saliency(module, lambda m: m(x).sum())(arrays(module))
    assert found["weight"].tolist() == [[6, 5]]
    assert found["bias"] == pytest.approx(abs(module.bias.item()))


class Versioned(nn.Linear):
    """Has more in its state dict than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_saliency_of_a_frozen_module_is_that_of_a_trained_one() -> None:
    module, x = nn.Sequential(Versioned(3, 2), nn.Linear(2, 1)), torch.ones(1, 3)
    given = {n: t.detach().numpy().copy() for n, t in module.named_parameters()}
    trained = torch_saliency(module, lambda m: m(x).sum())(given)
    module[0].requires_grad_(False)
    module[1].weight.requires_grad_(False)
    frozen = torch_saliency(module, lambda m: m(x).sum())(given)
    assert all(np.array_equal(frozen[name], trained[name]) for name in given)
    assert [p.requires_grad for p in module.parameters()] == [False, False, False, True]


class Counting(nn.Module):
    """Counts its calls in a buffer that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.line(x)


@pytest.mark.parametrize("cast", [lambda m: m, lambda m: m.half().float(), lambda m: m.double()])
def test_a_module_is_as_before_whatever_was_done_to_it(cast: Callable[[Any], Any]) -> None:
    module, x = Counting().eval(), torch.ones(1, 3)
    before, given = module(x).clone(), arrays(module)
    others = {name: array + 0.1 for name, array in given.items()}
    tensors = [*module.parameters(), *module.buffers()]
    torch_evaluate(module, lambda m: (m(x).sum(), cast(m))[0])(others)
    assert module.calls.item() == 1
    assert torch.equal(module(x), before)
    torch_finetune(module, lambda m, _: (m(x), cast(m)), steps=1)(others, {})
    assert module.calls.item() == 2
    now = [*module.parameters(), *module.buffers()]
    assert [id(tensor) for tensor in now] == [id(tensor) for tensor in tensors]


@pytest.mark.parametrize("steps", [0, 1.5, "3", None])
def test_finetune_wants_steps(steps: Any) -> None:
    with pytest.raises(ArgumentError, match="steps must be"):
        torch_finetune(small(), lambda m, _: None, steps=steps)
