"""Typed, frozen and validated configuration: the only reader of ConfigDict.

A file under configs/ builds a ``ConfigDict``; :func:`resolve` turns it once into this package's frozen dataclasses.
Every mistake is reported together as a :class:`ConfigError` that names the field, the value and what was expected.
"""

from llip_jax.config.data import (
    AugmentConfig,
    CaptionConfig,
    CaptionRules,
    DataConfig,
    FieldsConfig,
    FolderConfig,
    LimitsConfig,
    PartConfig,
    SourceConfig,
    TfdsConfig,
    TokenizerConfig,
    ToyWorldConfig,
)
from llip_jax.config.errors import ConfigError, nearest
from llip_jax.config.model import BigVisionConfig, ModelConfig, TextConfig, VisionConfig
from llip_jax.config.resolve import dataclass_in, differences, field_name, resolve, to_dict
from llip_jax.config.run import (
    CheckpointConfig,
    ClassesConfig,
    Config,
    EvalConfig,
    EvalSetConfig,
    FaultsConfig,
    InitConfig,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PairLossConfig,
    PairScoresConfig,
    Scorer,
    Task,
    TrainConfig,
)

__all__ = [
    "AugmentConfig",
    "BigVisionConfig",
    "CaptionConfig",
    "CaptionRules",
    "CheckpointConfig",
    "ClassesConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "EvalSetConfig",
    "FaultsConfig",
    "FieldsConfig",
    "FolderConfig",
    "InitConfig",
    "LimitsConfig",
    "MeshConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PairLossConfig",
    "PairScoresConfig",
    "PartConfig",
    "Scorer",
    "SourceConfig",
    "Task",
    "TextConfig",
    "TfdsConfig",
    "TokenizerConfig",
    "ToyWorldConfig",
    "TrainConfig",
    "VisionConfig",
    "dataclass_in",
    "differences",
    "field_name",
    "nearest",
    "resolve",
    "to_dict",
]
