"""Convert an attention to the plain arguments of an operator, and back.

An operator takes tensors, numbers and strings. Integers such as offsets may be symbols in a graph (``torch.SymInt``).
So they are numbers, and no part of a string. A string, the *form*, contains only what does not depend on lengths: the
class of each pattern and bias, and which optional fields are present.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from attnzoo.errors import InvalidArgumentError
from attnzoo.spec.bias import Bias, DenseBias, RelativeBias
from attnzoo.spec.patterns import Causal, Chunks, Full, Pattern, SortedChunks, Window
from attnzoo.spec.segments import Attention, Segment

_CLASSES: tuple[type[Any], ...] = (Full, Causal, Window, Chunks, SortedChunks, RelativeBias, DenseBias)
_BY_NAME = {cls.__name__: cls for cls in _CLASSES}
# ``values`` of a bias may get a gradient, so they are in ``Flat.trained``.
_FIELDS = {name: tuple(field.name for field in fields(cls) if field.name != "values") for name, cls in _BY_NAME.items()}
_NONE, _TRUE, _FALSE, _INTEGER, _MASK = "-", "T", "F", "i", "m"


class Flat(NamedTuple):
    """An attention as plain arguments.

    Attributes:
        trained: the distinct tensors that may get a gradient.
        masks: the tensors that get no gradient.
        numbers: the integers. The first is always 0, because PyTorch cannot differentiate operators with empty lists.
        factors: scale, dropout and, if there is one, softcap.
        form: everything else.
    """

    trained: list[Tensor]
    masks: list[Tensor]
    numbers: list[int]
    factors: list[float]
    form: str


def flatten(attention: Attention) -> Flat:
    """Return the plain arguments. The compiler traces this function, so it uses only simple Python.

    Raises:
        InvalidArgumentError: a pattern or a bias has a class that is not part of attnzoo.
    """
    flat = Flat([], [], [0], [attention.scale, attention.dropout], "")
    if attention.softcap is not None:
        flat.factors.append(attention.softcap)
    forms = [_place(flat, attention.query)]
    forms.append(_optional(flat, attention.query_mask))
    forms.append(_NONE if attention.empty is None else _place(flat, attention.empty))
    for segment in attention.segments:
        forms.append(_place(flat, segment.key))
        forms.append(_place(flat, segment.value))
        forms.append(_optional(flat, segment.key_mask))
        forms.append(_optional(flat, segment.mask))
        forms.append(_described(flat, "pattern", segment.pattern))
        if segment.bias is None:
            forms.append(_NONE)
        else:
            forms.append(f"{_place(flat, segment.bias.values)} {_described(flat, 'bias', segment.bias)}")
    return flat._replace(form=",".join(forms))


def _place(flat: Flat, tensor: Tensor) -> str:
    """Return the index of a tensor in ``flat.trained``. Segments may share tensors."""
    for index, known in enumerate(flat.trained):
        if known is tensor:
            return str(index)
    flat.trained.append(tensor)
    return str(len(flat.trained) - 1)


def _optional(flat: Flat, mask: Tensor | None) -> str:
    if mask is None:
        return _NONE
    flat.masks.append(mask)
    return _MASK


def _described(flat: Flat, argument: str, item: Pattern | Bias) -> str:
    name = type(item).__name__
    if name not in _BY_NAME or type(item) is not _BY_NAME[name]:
        raise InvalidArgumentError(argument, name, f"{', '.join(_BY_NAME)} in a graph")
    letters = [name, " "]
    for field in _FIELDS[name]:
        value = getattr(item, field)
        if value is None:
            letters.append(_NONE)
        elif value is True:
            letters.append(_TRUE)
        elif value is False:
            letters.append(_FALSE)
        elif isinstance(value, Tensor):
            flat.masks.append(value)
            letters.append(_MASK)
        else:
            flat.numbers.append(value)
            letters.append(_INTEGER)
    return "".join(letters)


@dataclass
class _Reader:
    """Reads the arguments in the order in which :func:`flatten` has written them."""

    flat: Flat

    def __post_init__(self) -> None:
        self._words = iter(self.flat.form.split(","))
        self._masks = iter(self.flat.masks)
        self._numbers = iter(self.flat.numbers[1:])

    def attention(self) -> Attention:
        query = self._tensor(next(self._words))
        query_mask = self._mask()
        empty = next(self._words)
        segments = tuple(self._segments())
        scale, dropout, *softcap = self.flat.factors
        return Attention(
            query,
            segments,
            scale,
            dropout,
            query_mask,
            None if empty == _NONE else self._tensor(empty),
            softcap[0] if softcap else None,
        )

    def _segments(self) -> Iterator[Segment]:
        for word in self._words:
            key, value = self._tensor(word), self._tensor(next(self._words))
            key_mask, mask = self._mask(), self._mask()
            pattern = self._item(next(self._words))
            place, _, bias = next(self._words).partition(" ")
            read = None if place == _NONE else self._item(bias, values=self._tensor(place))
            yield Segment(key, value, pattern, key_mask, mask, read)

    def _tensor(self, place: str) -> Tensor:
        return self.flat.trained[int(place)]

    def _mask(self) -> Tensor | None:
        return None if next(self._words) == _NONE else next(self._masks)

    def _item(self, word: str, **known: Any) -> Any:
        name, letters = word.split(" ")
        values = {field: self._value(letter) for field, letter in zip(_FIELDS[name], letters, strict=True)}
        return _BY_NAME[name](**values, **known)

    def _value(self, letter: str) -> Any:
        if letter == _INTEGER:
            return next(self._numbers)
        return next(self._masks) if letter == _MASK else {_NONE: None, _TRUE: True, _FALSE: False}[letter]


def unflatten(flat: Flat) -> Attention:
    """Return the attention from which :func:`flatten` has made the plain arguments.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> flat = flatten(Attention(q, (Segment(k, v, Window(2, 1)),), scale=0.5))
        >>> flat.form, flat.numbers
        ('0,-,-,1,2,-,-,Window ii-,-', [0, 2, 1])
        >>> unflatten(flat).segments[0].pattern
        Window(left=2, right=1, offset=None)
    """
    return _Reader(flat).attention()
