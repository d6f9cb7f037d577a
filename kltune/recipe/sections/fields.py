"""What every section is made of: strict and frozen, and the types of number and text that recipes know."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Lines = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x09\x0b-\x1f\x7f]+$")]
# far beyond use, and within float32, in which tensors are held
Positive = Annotated[float, Field(gt=0, le=1e30)]
NotNegative = Annotated[float, Field(ge=0, le=1e30)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=10**9)]


class Section(BaseModel):
    """A frozen part of a recipe: no unknown keys, no guessing of types, finite numbers only."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


def is_changed(section: Any, name: str) -> bool:
    """Whether a key of a section holds anything but its default."""
    return getattr(section, name) != type(section).model_fields[name].default
