"""How responses are drawn, in training and in evaluations."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_dgrpo.config.frozen import Frozen


class Sampling(Frozen):
    """How responses are drawn. The same temperature divides the student's and the teacher's logits in training."""

    max_tokens: PositiveInt
    """Longest response, the end-of-sequence token included."""
    temperature: Annotated[float, Field(ge=0.01, le=2.0)] = 1.0
    """0.01 to 2, which is vLLM's range."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: NonNegativeInt = 0
    """Draw from so many of the likeliest tokens (0: all)."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Draw from tokens at least this fraction as likely as the likeliest."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of tokens that the response has."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Subtracted from the logits of tokens once for each time that the response has them."""
    repetition_penalty: PositiveFloat = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that the prompt or the response has."""

    @property
    def shaping(self) -> dict[str, float]:
        """All that changes the distribution beside the temperature."""
        return self.model_dump(exclude={"max_tokens", "temperature"})

    @property
    def shapes(self) -> list[str]:
        """The settings among them that are not at their defaults, and so change something."""
        return [
            f"{name}={value:g}"
            for name, value in self.shaping.items()
            if value != type(self).model_fields[name].default
        ]
