"""Running a model or one of its modules for a comparison: what it gives on real tokens, and the gradients of that."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import InvalidArgumentError

GRADIENT = "gradient of all parameters"


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A copy of the value with its floating-point tensors, also those in dicts, lists and tuples, in a dtype.

    A number as low as its dtype goes hides a token, and is as low as the new dtype goes afterwards. Objects that a
    forward fills, such as caches, are copied as they are.

    Args:
        value: arguments of a forward.
        dtype: of the copy; None: each tensor keeps its own.
    """
    if isinstance(value, Tensor):
        if dtype is None or not value.is_floating_point() or value.dtype == dtype:
            return value.detach().clone()
        hidden = value <= torch.finfo(value.dtype).min
        return value.detach().to(dtype).masked_fill(hidden, torch.finfo(dtype).min)
    if isinstance(value, Mapping):
        return {key: cast(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(cast(item, dtype) for item in value)
    return copy.deepcopy(value)


def run_model(
    model: nn.Module,
    inputs: dict[str, Any],
    gradients: bool,
    seed: int,
    inference: bool = False,
    graph: bool = False,
) -> dict[str, Tensor]:
    """Outputs on real tokens by name, and the gradient of a random function of them.

    The gradient is one vector over all parameters that require grad: a single one may be zero but for rounding (a key
    projection's bias shifts every score of a row alike), and rounding alone has no budget. To judge one parameter,
    freeze the others.

    Args:
        model: in eval mode.
        inputs: of its forward.
        gradients: whether to compute the gradient.
        seed: of the random function, and of what the model draws.
        inference: take the outputs from a forward without gradients, which may go other ways than training.
        graph: where no gradient is computed, run the forward as if one were.
    """
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = gradients and bool(parameters)
    found = {}
    if inference or not gradients:
        torch.manual_seed(seed)
        with torch.set_grad_enabled(graph and not inference):
            found = {what: output.detach() for what, output in _outputs(model, inputs).items()}
    if not gradients:
        return found
    torch.manual_seed(seed)
    with torch.enable_grad():
        outputs = _outputs(model, inputs)
    gradient = gradient_of(outputs.values(), parameters, seed)
    return {**{what: output.detach() for what, output in outputs.items()}, **found, GRADIENT: gradient}


def gradient_of(outputs: Iterable[Tensor], wanted: list[Tensor], seed: int) -> Tensor:
    """The gradient of a random linear function of outputs with respect to tensors, as one vector."""
    generator = torch.Generator().manual_seed(seed)

    def weights(output: Tensor) -> Tensor:
        return torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(output)

    with torch.enable_grad():
        total = sum((output * weights(output)).sum() for output in outputs)
    grads = torch.autograd.grad(total, wanted, allow_unused=True)  # type: ignore[arg-type]
    flat = [
        (torch.zeros_like(tensor) if grad is None else grad).flatten()
        for tensor, grad in zip(wanted, grads, strict=True)
    ]
    return torch.cat(flat)


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Every floating-point tensor the model returns by name; rows of padding tokens are left out."""
    returned = model(**inputs)
    items = returned.items() if isinstance(returned, Mapping) else [("output", returned)]
    decodes = _decodes(model)
    found = {}
    for name, output in items:
        if isinstance(output, Tensor) and output.is_floating_point():
            real = real_tokens(inputs, decodes and not name.startswith("encoder"), output)
            found[name] = output if real is None else output[real]
    if not found:
        raise InvalidArgumentError(
            "inputs", f"{sorted(inputs)}, for which the model returns no tensor", "a real forward"
        )
    return found


def _decodes(model: nn.Module) -> bool:
    return "decoder_input_ids" in inspect.signature(model.forward).parameters  # an encoder alone shares the config


def real_tokens(inputs: Mapping[str, Any], decoder: bool, output: Tensor) -> Tensor | None:
    """Which rows ``(batch, length)`` of an output belong to real tokens; None if the inputs do not say.

    A decoder's rows count where its sample has a source to attend to.
    """
    mask = inputs.get("attention_mask")
    if decoder:
        sources = None if mask is None else mask.bool().flatten(1).any(1)
        mask = inputs.get("decoder_attention_mask")
        if mask is None and sources is not None and output.ndim > 1:
            mask = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        mask = mask if mask is None or sources is None else mask.bool() & sources[:, None]
    if not isinstance(mask, Tensor) or mask.ndim != 2 or output.shape[:2] != mask.shape:
        return None
    return mask.bool()


def rows_of_modules(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[str, Tensor], Tensor | None]:
    """A function of a module's name and its output ``(batch, length, ...)``: which rows belong to real tokens.

    Models pad their inputs to a multiple of a block at the end: what is behind the mask is padding.
    """
    decoders = [name for name, module in model.named_modules() if name.rpartition(".")[2] == "decoder"]
    decodes = _decodes(model)

    def rows(name: str, output: Tensor) -> Tensor | None:
        decoder = decodes and any(name.startswith(f"{prefix}.") for prefix in decoders)
        prefix = "decoder_" if decoder else ""
        ids = next(
            (x for key in ("input_ids", "inputs_embeds") if isinstance(x := inputs.get(prefix + key), Tensor)), None
        )
        if output.ndim < 2 or ids is None or output.shape[0] != ids.shape[0] or output.shape[1] < ids.shape[1]:
            return None
        real = real_tokens(inputs, decoder, output[:, : ids.shape[1]])
        if real is None and output.shape[1] == ids.shape[1]:
            return None
        shown = torch.zeros(output.shape[:2], dtype=torch.bool, device=output.device)
        shown[:, : ids.shape[1]] = True if real is None else real
        return shown

    return rows
