"""Run a model, and return what ``verify`` compares: the outputs on real tokens, and the parameter gradient."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import InvalidArgumentError

GRADIENT = "gradient of all parameters"
# Suffix of the names of outputs of the forward that builds a graph. This forward may run other kernels.
WITH_GRAPH = " (gradients enabled)"
_ITEM = "output["  # begins the names of the items of a tuple or list


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """Return a copy of the arguments of a forward, with all floating-point tensors in ``dtype``.

    Tensors in dicts, lists and tuples are converted, too. Caches and other objects are copied. If ``dtype`` is None,
    each tensor keeps its dtype. The lowest number of the old dtype (in masks) becomes the lowest number of ``dtype``.
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


def check_gradient_mode(gradients: bool) -> None:
    """Raise if gradients are requested inside ``torch.inference_mode()``."""
    if gradients and torch.is_inference_mode_enabled():
        allowed = "False, or a call outside torch.inference_mode()"
        raise InvalidArgumentError("gradients", "True inside torch.inference_mode()", allowed)


def run_model(
    model: nn.Module, inputs: dict[str, Any], gradients: bool, seed: int, inference: bool = False, graph: bool = False
) -> dict[str, Tensor]:
    """Return a model's outputs on real tokens, by name, and the gradient of a random function of these outputs.

    The gradient is one vector over all parameters that require grad. It is not compared parameter by parameter, because
    the exact gradient and the error budget of one parameter may be zero. For example, the bias of a key projection adds
    the same number to all scores of a query, which does not change the softmax.

    Args:
        seed: seed of the random function and of the model's random numbers.
        inference: whether a forward without gradients always runs, because it may run other kernels. If a forward with
            gradients runs, too, the result contains the outputs of both. The names of the outputs with gradients then
            end with :data:`WITH_GRAPH`.
        graph: whether to run a forward with gradients enabled even if ``gradients`` is False, so that observers of
            sites see its attentions. The outputs of this forward are not returned.
    """
    parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = gradients and bool(parameters)
    results: dict[str, Tensor] = {}
    if inference or not gradients:
        torch.manual_seed(seed)
        with torch.no_grad():
            results = _outputs(model, inputs)
    if graph and not gradients:
        torch.manual_seed(seed)
        with torch.enable_grad():
            _outputs(model, inputs)
    if gradients:
        torch.manual_seed(seed)
        with torch.enable_grad():
            outputs = _outputs(model, inputs)
        named = {f"{what}{WITH_GRAPH}" if inference else what: output for what, output in outputs.items()}
        results |= {**named, GRADIENT: gradient_of(outputs.values(), parameters, seed)}
    return {what: result.detach() for what, result in results.items()}


def gradient_of(outputs: Iterable[Tensor], leaves: list[Tensor], seed: int) -> Tensor:
    """Return, as one vector, the gradient of a random linear function of ``outputs`` with respect to ``leaves``."""
    generator = torch.Generator().manual_seed(seed)

    def weights(output: Tensor) -> Tensor:
        return torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(output)

    with torch.enable_grad():
        total = sum((output * weights(output)).sum() for output in outputs)
    grads = torch.autograd.grad(total, leaves, materialize_grads=True)  # type: ignore[arg-type]
    return torch.cat([grad.detach().flatten() for grad in grads])


def _outputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Return each floating-point tensor that the model returns, by name and without the rows of padding tokens.

    The model returns a tensor, or a mapping, a tuple or a list of tensors.
    """
    returned = model(**cast(inputs, None))  # a model may change its inputs, and then each run would get other inputs
    has_decoder = _has_decoder(model)
    outputs = {}
    for name, output in _named(returned):
        if isinstance(output, Tensor) and output.is_floating_point():
            real = _real_rows(inputs, name, output, has_decoder)
            outputs[name] = output if real is None else output[real]
    if not outputs:
        got = f"{sorted(inputs)}, for which the model returns {_kind(returned)} without a floating-point tensor"
        raise InvalidArgumentError("inputs", got, "arguments for which the model returns a floating-point tensor")
    return outputs


def _named(returned: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(returned, Mapping):
        return returned.items()
    if isinstance(returned, (tuple, list)):
        return [(f"{_ITEM}{index}]", item) for index, item in enumerate(returned)]
    return [("output", returned)]


def _kind(returned: Any) -> str:
    return "None" if returned is None else f"a {type(returned).__name__}"


def _real_rows(inputs: Mapping[str, Any], name: str, output: Tensor, has_decoder: bool) -> Tensor | None:
    """Return a bool mask of the real tokens of an output of the model, or None if all its rows are real.

    An item of a tuple has no name that says whether its rows belong to the encoder or to the decoder. The length of the
    item decides. If both have this length, only rows that are real tokens of both are compared.
    """
    both = has_decoder and name.startswith(_ITEM)
    sides = (False, True) if both else (has_decoder and not name.startswith("encoder"),)
    masks = [mask for side in sides if (mask := real_tokens(inputs, side, output)) is not None]
    return torch.stack(masks).all(0) if masks else None


def _has_decoder(model: nn.Module) -> bool:
    # The config cannot show this, because the encoder of a model has the same config as the whole model.
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def real_tokens(inputs: Mapping[str, Any], decoder: bool, output: Tensor) -> Tensor | None:
    """Return a bool mask ``(batch, length)``, True for output rows of real tokens, or None if the inputs have no mask.

    If a sample has no real source token, its decoder tokens are not real, because cross-attention then has no key.
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
    """Return a function ``rows(name, output)`` that returns the mask of real tokens in the output of a module.

    The function returns None if all tokens are real. Some models pad the inputs to a multiple of a block size. So the
    output of a module may be longer than the inputs. The additional tokens at the end are padding.
    """
    decoders = [name for name, module in model.named_modules() if name.rpartition(".")[2] == "decoder"]
    has_decoder = _has_decoder(model)

    def rows(name: str, output: Tensor) -> Tensor | None:
        decoder = has_decoder and any(name.startswith(f"{prefix}.") for prefix in decoders)
        prefix = "decoder_" if decoder else ""
        values = (inputs.get(prefix + key) for key in ("input_ids", "inputs_embeds"))
        ids = next((value for value in values if isinstance(value, Tensor)), None)
        if output.ndim < 2 or ids is None or output.shape[0] != ids.shape[0] or output.shape[1] < ids.shape[1]:
            return None
        real = real_tokens(inputs, decoder, output[:, : ids.shape[1]])
        if real is None and output.shape[1] == ids.shape[1]:
            return None
        shown = torch.zeros(output.shape[:2], dtype=torch.bool, device=output.device)
        shown[:, : ids.shape[1]] = True if real is None else real
        return shown

    return rows
