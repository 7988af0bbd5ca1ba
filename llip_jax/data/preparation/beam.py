"""Shards written by Apache Beam, on this machine or on a cluster whose workers see the same folders."""

from collections.abc import Sequence

from llip_jax.config import ConfigError
from llip_jax.data.preparation.shards import Preparation, write_shard


def write_with_beam(preparation: Preparation, shards: Sequence[int], arguments: Sequence[str]) -> None:
    """Writes shards, each as one element of a Beam pipeline.

    Args:
        preparation: what to write.
        shards: numbers of the shards.
        arguments: options of the pipeline, as on a command line; the default runner is Beam's direct one.

    Raises:
        ConfigError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ConfigError("--runner: beam needs Apache Beam: pip install 'llip_jax[beam]'") from error
    with beam.Pipeline(options=PipelineOptions(list(arguments))) as pipeline:
        # Reshuffled, as neighbouring elements would otherwise be taken by one worker.
        _ = (
            pipeline
            | "Shards" >> beam.Create(list(shards))
            | beam.Reshuffle()
            | "Write" >> beam.Map(_write, preparation=preparation)
        )


def _write(shard: int, preparation: Preparation) -> None:
    write_shard(preparation, shard)
