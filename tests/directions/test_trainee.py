from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import eager, losses
from tiny import tiny_model, tiny_rows
from torch import Tensor

from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.engine.blocks import decoder_blocks
from alphatoken_curate.engine.capture import captured
from alphatoken_curate.errors import ModelError
from alphatoken_curate.tokens.plan import collate

pytestmark = pytest.mark.usefixtures("all_float64")

ROWS = tiny_rows()


def test_what_trains_is_what_scores() -> None:
    def names(layers: Any, parameters: Any) -> list[str]:
        return Trainee(tiny_model("qwen2"), layers, parameters).names

    every = [name for name, _ in tiny_model("qwen2").named_parameters()]
    assert names("all", "all") == every
    linear = names(1, "linear")
    assert linear and all(".layers.3." in name and name.endswith("proj.weight") for name in linear)
    assert set(every) - set(names(3, "all")) == {name for name in every if ".layers.0." in name}
    assert names("all", "linear") == [name for name in every if name.endswith("proj.weight")]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("parameters", ["linear", "all"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mixtral"])
def test_numbers_of_the_weights_and_a_direction_are_the_same_in_another_order(family: str, parameters: Any) -> None:
    trainee, model = Trainee(tiny_model(family), 2, parameters), tiny_model(family)
    with captured(model, 2, parameters) as scoring:
        direction = trainee.as_direction([w.detach() for w in trainee.weights])
        assert all(torch.equal(own, w) for own, w in zip(direction, scoring.weights, strict=True))
    back = trainee.of_direction(direction)
    assert all(torch.equal(own, w) and own is not w for own, w in zip(back, trainee.weights, strict=True))


def plain(model: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """A copy with graphs, the losses of each row, and its parameters."""
    model = eager(model).requires_grad_(True)
    rows = [losses(model, torch.from_numpy(r.input_ids).long(), r.response.nonzero()[0].tolist()) for r in ROWS]
    return model, rows, list(model.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_losses_and_gradients_are_those_of_autograd(family: str) -> None:
    trainee = Trainee(tiny_model(family), "all", "all")
    _, rows, parameters = plain(tiny_model(family))
    batches = [collate(ROWS, [0, 4, 5]), collate(ROWS, [2, 1, 3])]
    for batch in batches:
        torch.testing.assert_close(trainee.nll(batch), torch.cat([rows[i] for i in batch.rows]), rtol=1e-10, atol=0)
    mean = torch.cat(rows).mean()
    gradient, loss, tokens = trainee.gradient(batches)
    assert tokens == sum(len(r) for r in rows) and loss == pytest.approx(float(mean.detach()), rel=1e-12)
    for own, wanted in zip(gradient, torch.autograd.grad(mean, parameters), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-14)


def test_products_are_those_of_two_backwards_one_token_at_a_time() -> None:
    trainee = Trainee(tiny_model("gpt2"), "all", "all")
    _, rows, parameters = plain(tiny_model("gpt2"))
    generator = torch.Generator().manual_seed(3)
    along = [[torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters] for _ in range(2)]
    batch, into = collate(ROWS, [0, 3]), [[torch.ones_like(p, requires_grad=False) for p in parameters] for _ in along]
    (parts,) = trainee.products(batch, along, into, 0.25)
    tokens = torch.cat([rows[0], rows[3]])
    for n, a in enumerate(along):
        each = []
        for loss in tokens:
            grads = torch.autograd.grad(loss, parameters, retain_graph=True)
            each.append(0.25 * sum((x * g).sum() for x, g in zip(a, grads, strict=True)))
        torch.testing.assert_close(parts[n], torch.stack(each), rtol=1e-9, atol=1e-12)  # type: ignore[arg-type]
        grads = list(torch.autograd.grad(0.25 * tokens.sum(), parameters, create_graph=True))
        for own, wanted in zip(into[n], torch.autograd.grad(grads, parameters, a, retain_graph=True), strict=True):
            torch.testing.assert_close(own, 1 + wanted, rtol=1e-9, atol=1e-12)


def test_the_model_is_given_back_with_what_trained_before() -> None:
    model = tiny_model("gpt2").requires_grad_(False)
    first = next(model.parameters()).requires_grad_(True)
    trainee = Trainee(model, 1, "linear")
    trainee.gradient([collate(ROWS, [0])])
    assert [p for p in model.parameters() if p.requires_grad] == [first]
    assert all(p.grad is None for p in model.parameters())


def test_too_many_layers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"--layers 9: the model has 4 decoder blocks\. Give 1 to 4, or all"):
        Trainee(tiny_model("gpt2"), 9)


def test_narrow_weights_are_refused() -> None:
    with pytest.raises(ModelError, match=r"its weights are torch.bfloat16, and a rehearsal trains in float32"):
        Trainee(tiny_model("gpt2", dtype=torch.bfloat16), 1)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = tiny_model("gpt2")
    next(model.parameters()).detach()[...] = torch.nan
    with pytest.raises(ModelError, match="its logits are not finite: some weight is NaN or infinite"):
        Trainee(model, 1)


class Act(torch.nn.Module):
    """An activation of one of these functions."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.function.apply(x)
        return found


class _Hidden(torch.autograd.Function):
    """Its backward gives a gradient that the second derivative does not see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].detach().cos()


class _Once(_Hidden):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class _Flash:
    """Something that torch itself differentiates once."""

    @staticmethod
    def apply(x: Tensor) -> Tensor:
        found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x[None], x[None], x[None])[0][0]
        return found


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_Hidden, "second derivative of its loss .* some function in it hides a part"),
        (_Once, "second derivative of its loss .* some function in it hides a part"),
        (_Flash, "torch does not differentiate it twice: .*flash_attention"),
    ],
)
def test_what_hides_from_the_second_derivative_is_refused(function: Any, message: str) -> None:
    model = tiny_model("gpt2")
    model.transformer.h[3].mlp.act = Act(function)
    with pytest.raises(ModelError, match=f"GPT2LMHeadModel: it cannot be rehearsed: .*{message}"):
        Trainee(model, 1)


def test_blocks_below_run_once_for_a_batch_where_nothing_under_them_trains() -> None:
    def runs(layers: Any, parameters: Any, family: str = "gpt2") -> int:
        model, ran = tiny_model(family), list[int]()
        trainee = Trainee(model, layers, parameters)
        blocks = decoder_blocks(model, model.base_model)
        next(blocks[0].children()).register_forward_hook(lambda *_: ran.append(1))
        batch = collate(ROWS, [0, 1])
        into = [torch.zeros_like(w, requires_grad=False) for w in trainee.weights]
        for _ in range(2):
            gradient = trainee.gradient([batch])[0]
            trainee.products(batch, [gradient], [into], 1.0)
        return len(ran)

    assert runs(2, "linear") == 1
    assert runs("all", "linear") == runs(2, "all") == 4
    assert runs(1, "linear", "gemma4_unified_text") == 4, "its last blocks take keys and values from others"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_rows_come_out_below_as_in_the_batches_they_train_in(family: str, dtype: Any) -> None:
    """The same bits whether that is kept or computed once more, and but for rounding those of any other batch."""
    model = tiny_model(family, dtype=torch.float32)
    trainee, ran = Trainee(model, 1, "linear", dtype=dtype), list[int]()
    blocks = decoder_blocks(model, model.base_model)
    next(blocks[0].children()).register_forward_hook(lambda *_: ran.append(1))
    trained, mixed = (
        [collate(ROWS, [0, 1]), collate(ROWS, [2, 3, 4])],
        [collate(ROWS, i) for i in ([1, 3], [0, 2], [4])],
    )
    along = trainee.gradient([collate(ROWS, [5])])[0]

    def products(within: Any) -> list[Tensor]:
        into = [torch.zeros_like(w, requires_grad=False) for w in trainee.weights]
        with trainee.trained_in(within):
            return [*(trainee.products(batch, [along], [into], 1.0) for batch in mixed), *into]

    trainee.gradient(trained)
    ran.clear()
    kept = products(trained)
    assert not ran
    trainee._below.room = 1
    trainee.gradient([collate(ROWS, [5])])
    for own, wanted in zip(products(trained), kept, strict=True):
        assert torch.equal(own, wanted)
    assert ran
    tolerance = 1e-4 if dtype is None else 0.1
    for own, wanted in zip(products([]), kept, strict=True):
        assert (own - wanted).norm() < tolerance * wanted.norm()
