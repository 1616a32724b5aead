"""What one conversion is: all that the command line or a YAML file can say, checked before any work. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from moesaic.adjust.allocation_config import AllocationConfig
from moesaic.adjust.router_config import RouterFitConfig
from moesaic.calibration.config import CalibrationConfig
from moesaic.errors import InputError
from moesaic.jobs.choice import UNNAMED, Choice, choose_method
from moesaic.methods import METHODS, get_config
from moesaic.options import build
from moesaic.options.device import AUTO as AUTO_DEVICE
from moesaic.options.device import MEANING as DEVICE_MEANING
from moesaic.options.device import DeviceName
from moesaic.options.memory import MEANING as MEMORY_MEANING
from moesaic.options.memory import MemorySize, parse_bytes
from moesaic.targets import AUTO, TARGETS
from moesaic.targets.base import TargetOptions

if TYPE_CHECKING:
    from moesaic.anatomy.base import Anatomy
    from moesaic.methods.base import MethodConfig


class ConvertSettings(BaseModel):
    """One conversion. ``moesaic convert --config run.yaml`` reads exactly these keys; unknown ones are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(
        default=UNNAMED,
        description="Method name, see `moesaic methods`. auto: neuron_experts; for a stock target token_clusters; "
        "where a layout or a linear router is given, cmoe.",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="The method's own options, e.g. {layout: S3A3E8}."
    )
    calibration: CalibrationConfig = Field(
        default_factory=CalibrationConfig, description="Calibration text; unused by methods that need none."
    )
    router: RouterFitConfig | None = Field(
        default=None,
        description="Replace each router by a linear one, which stock engines can run: `oracle` chooses the experts "
        "that do most, `decisions` imitates the method's own router; {mode: oracle, steps: 10} sets more. Null keeps "
        "the own.",
    )
    target: str = Field(
        default=AUTO,
        description="Architecture of the output, see `moesaic targets`. auto: a stock one if it holds the model, else "
        "moesaic.",
    )
    target_options: TargetOptions = Field(
        default_factory=TargetOptions, description="How routing is put into a stock architecture."
    )
    hierarchical: bool = Field(default=False, description="Convert the experts of a model that is MoE already.")
    whole: bool = Field(
        default=False,
        description="Of a multimodal checkpoint: convert the text model in place and carry all else unchanged. The "
        "output then reads images as the checkpoint does. Without, it is the text model alone.",
    )
    dense_layers: tuple[int, ...] = Field(
        default=(), description="Decoder layers to leave dense; negative counts from the end."
    )
    allocation: AllocationConfig | None = Field(
        default=None,
        description="Share the active neurons out over the layers by what each loses, at the same total: `auto`, "
        "`leading`, `any`, `widths`, or {mode: any, tokens: 4096}. Null treats all layers alike.",
    )
    budget: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="For a given blueprint whose experts have widths of their own, or are single neurons: the fraction "
        "of each converted FFN's neurons that the calibration text may use in the mean; other text than made the "
        "blueprint.",
    )
    seed: int = Field(default=0, description="Seed of everything random in the method.")
    device: DeviceName = Field(default=AUTO_DEVICE, description=DEVICE_MEANING)
    memory: MemorySize | None = Field(default=None, description=MEMORY_MEANING)

    @property
    def allowed_bytes(self) -> int | None:
        """:attr:`memory` in bytes."""
        return None if self.memory is None else parse_bytes(self.memory)

    @field_validator("router", "allocation", mode="before")
    @classmethod
    def _mode_alone(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_choice(self) -> ConvertSettings:
        if self.allocation is not None and self.dense_layers:
            raise InputError("both dense_layers and allocation are given", "allocation chooses the dense layers")
        return self

    @model_validator(mode="after")
    def _choose(self) -> ConvertSettings:
        """The method where none is named, and the text that a method asks for where none is."""
        method = vars(self)["method"]
        if method == UNNAMED:
            choice = self._choice()
            method = choice.method
            vars(self)["options"] = {**choice.options, **self.options}
            vars(self)["method"] = method  # not among the fields that somebody has set
        if method in METHODS and (wanted := get_config(method).text):
            given = {name: getattr(self.calibration, name) for name in self.calibration.model_fields_set}
            vars(self)["calibration"] = CalibrationConfig.model_validate({**wanted, **given})
        return self

    @property
    def chosen(self) -> str:
        """Which method was taken where none was named, and why, in a line; else empty."""
        if "method" in self.model_fields_set and self.method != UNNAMED:
            return ""
        active = getattr(method_config(self), "active", None)
        share = "" if active is None else f" at {active:.0%} active (--active changes that)"
        return f"method {self.method}{share}: {self._choice().why}"

    def _choice(self) -> Choice:
        return choose_method(self.target, self.options, router=self.router is not None)

    @field_validator("target")
    @classmethod
    def _known_target(cls, target: str) -> str:
        if target not in (AUTO, *TARGETS):
            raise InputError(f"unknown target {target!r}", f"known: {AUTO}, {', '.join(TARGETS)}")
        return target


def load_settings(path: Path) -> dict[str, Any]:
    """The keys of a YAML settings file. Raises InputError when it is missing or not a mapping."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"settings file {path} does not exist", "check --config") from error
    except OSError as error:
        raise InputError(f"settings file {path} cannot be read: {error.strerror}", "give a YAML file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"settings file {path} cannot be read: {error.reason}", "save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason, place = " ".join(str(error).split()), _place(error)
        raise InputError(
            f"settings file {path} cannot be read: {reason}", f"mend {place}: `key: value` lines"
        ) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"settings file {path} holds no mapping", "write `key: value` lines")
    return data


def _place(error: Exception) -> str:
    """Where YAML stumbled."""
    mark = getattr(error, "problem_mark", None)
    return "it" if mark is None else f"line {mark.line + 1}"


def method_config(settings: ConvertSettings) -> MethodConfig:
    """The method's own config from ``settings.options``. Raises InputError for unknown methods, keys and values."""
    return build(get_config(settings.method), settings.options, f"method {settings.method}")


def check_layers(anatomy: Anatomy, dense_layers: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse layers that do not exist; returns the dense layers counted from 0."""
    resolved = []
    for layer in dense_layers:
        if not -anatomy.num_layers <= layer < anatomy.num_layers:
            raise InputError(f"dense layer {layer} of a model with {anatomy.num_layers} layers", "layers count from 0")
        resolved.append(layer % anatomy.num_layers)
    if len(set(resolved)) == anatomy.num_layers:
        raise InputError("every layer is kept dense", "leave at least one layer to convert")
    return tuple(sorted(set(resolved)))
