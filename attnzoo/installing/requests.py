"""Patch a model with the backends that the configurations of its parts request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from attnzoo.backend import Backend
from attnzoo.errors import PatchError, shorten
from attnzoo.installing.marks import mark_of
from attnzoo.installing.names import NamedBackend, read_name
from attnzoo.patching.forwards import patches_of
from attnzoo.patching.patch import put_plans, unpatch_all
from attnzoo.patching.plan import SitePlan, check_plans, plan_sites
from attnzoo.patching.sites import PatchTarget, find_sites

# The numbers of the patches that `install` made. Copies of a model have the number of the original's patch.
_numbers: set[int] = set()


def has_installed_patch(model: nn.Module) -> bool:
    """Whether a part of the model has a patch that ``install`` made."""
    return any(forward.patch.number in _numbers for module in model.modules() for forward in patches_of(module))


Requests = dict[str, NamedBackend | None]


def requests_of(model: nn.Module) -> Requests:
    """Return ``{name of a part: requested backend or None}``. Empty if no part requests a backend.

    The parts are the models of transformers inside the model, and the model itself.
    """
    from transformers import PreTrainedModel

    parts = ((name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel))
    requests: Requests = {}
    for name, part in parts:
        mark = mark_of(part.config)
        requests[name] = None if mark is None else read_name(mark.text, mark.explicit)
    return requests if any(requests.values()) else {}


def patch_as_requested(model: nn.Module) -> None:
    """Patch a model that was just built.

    The model may contain models that ``install`` has patched. One new patch replaces these patches. If the model
    contains a model that a user has patched, all earlier patches stay, and the new patch covers the other sites.

    Raises:
        PatchError, BackendRefusedError: as :func:`attnzoo.patch`. The model is unchanged.
    """
    plans = plan_built(model)
    if plans:
        _put(model, plans, replace=not any(map(_has_user_patch, find_sites(model))))


def plan_built(model: nn.Module) -> tuple[SitePlan, ...]:
    """Return the checked plans for a model that was just built. Empty if no part of the model requests a backend.

    A program may move a new model to a device and switch it to inference later. So the plans assume inference on a
    device of this machine, and each call is checked again.
    """
    requests = requests_of(model)
    if not requests:
        return ()
    targets = find_sites(model)
    assigned = _assign(model, targets, requests)
    if any(map(_has_user_patch, targets)):
        assigned = {target: backend for target, backend in assigned.items() if not any(patches_of(target.module))}
    with _inference(model):
        candidates = [plan_sites(model, targets, assigned, device) for device in _device_types()]
    accepted = (plans for plans in candidates if not any(plan.refusals for plan in plans))
    # If every device is refused, the accelerator's refusals say more than those of the CPU.
    plans = next(accepted, candidates[0])
    check_plans(plans)
    return plans


def patch_again(model: nn.Module) -> None:
    """Replace the patches that ``install`` made by the patches that the configurations now request.

    Raises:
        PatchError: a site has a patch that a user made, or an earlier patch also covers modules outside ``model``.
            Other errors are those of :func:`attnzoo.patch`. The model is unchanged.
    """
    requests = requests_of(model)
    targets = find_sites(model)
    blocked = [target.label for target in targets if _has_user_patch(target)]
    if blocked:
        raise PatchError(
            f"set_attn_implementation: got a model with a patch of attnzoo.patch at {shorten(', '.join(blocked))}; "
            "allowed: a model without such a patch (call attnzoo.unpatch(model))"
        )
    plans = plan_sites(model, targets, _assign(model, targets, requests)) if requests else ()
    check_plans(plans)
    if plans:
        _put(model, plans, replace=True)
    else:
        _unpatch_installed(model)


def _put(model: nn.Module, plans: tuple[SitePlan, ...], replace: bool) -> None:
    handle = put_plans(model, plans, remove=_unpatch_installed if replace else None)
    _numbers.add(handle.forwards[0].patch.number)


def _unpatch_installed(model: nn.Module) -> None:
    unpatch_all(model, _numbers)


def _assign(model: nn.Module, targets: list[PatchTarget], requests: Requests) -> dict[PatchTarget, Backend]:
    """Return the backend of each site: the request of the smallest part of the model that contains the site.

    Raises:
        PatchError: a user chose a backend for a part in which no site gets a backend.
    """
    sites = [target for target in targets if target.point.attends]
    around = {site: [part for part in requests if _is_inside(site.name, part)] for site in sites}
    decided = {site: requests[max(parts, key=len)] for site, parts in around.items() if parts}
    assigned = {site: request.backend for site, request in decided.items() if request is not None}
    for name, request in requests.items():
        if request is not None and request.explicit and not any(_is_inside(site.name, name) for site in assigned):
            part = model.get_submodule(name)
            find_sites(part)  # raises, with the reason, if an adapter is missing
            raise PatchError(
                f"attn_implementation: got {request.text!r} for {type(part).__name__}, whose attention modules belong "
                "to parts with another configuration; allowed: a name in the configurations of these parts"
            )
    return assigned


def _is_inside(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def _has_user_patch(target: PatchTarget) -> bool:
    return any(forward.patch.number not in _numbers for forward in patches_of(target.module))


def _device_types() -> tuple[str, ...]:
    """Return the types of the devices on which a model may run on this machine."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ("cpu",) if accelerator is None else (accelerator.type, "cpu")


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Context manager in which all modules of a model are in inference mode."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
