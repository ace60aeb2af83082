"""Decoding and looking, with the bundled network: people are found on what was decoded, one by one and in batches."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from cloud.batching import BatchLimits
from cloud.inference import Inference, Inferred
from cloud.metrics import CloudMetrics
from cloud.tasks.loading import load_task
from cloud.tasks.types import TaskModel
from shared.codec.bundle import save_bundle
from shared.codec.codec import Codec
from shared.codec.types import Bitstream, Frame
from shared.errors import InvalidInput, UnknownModel

NETWORK = "faster-rcnn-mobilenetv2"
PERSON = 1


@pytest.fixture(scope="module")
def other_codec(codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Codec:
    """A second model: the same transforms with other gains, hence another id."""
    bundle = codec.bundle
    arrays = {**bundle.arrays, "gain.log_inverse": bundle.arrays["gain.log_inverse"] + np.float32(0.01)}
    folder: Path = tmp_path_factory.mktemp("other")
    save_bundle(
        folder,
        name="other",
        architecture=bundle.architecture,
        skip_below=bundle.skip_below,
        arrays=arrays,
        info=bundle.info,
    )
    return Codec.load(folder)


@pytest.fixture(scope="module")
def network() -> TaskModel:
    return load_task(NETWORK)


@pytest.fixture
async def inference(codec: Codec, other_codec: Codec, network: TaskModel) -> AsyncIterator[Inference]:
    inference = Inference(
        [codec, other_codec],
        [network],
        limits=BatchLimits(max_batch=4, max_delay_s=0.2, max_waiting=64, max_waiting_camera=64),
        threads=1,
        unpack_threads=2,
        metrics=CloudMetrics(CollectorRegistry()),
    )
    inference.start()
    yield inference
    await inference.close()


def best_person(inferred: Inferred | None) -> tuple[float, list[float]]:
    assert inferred is not None
    found = inferred.outputs[0].detections
    people = np.flatnonzero(found.category_ids.numpy() == PERSON)
    return max((float(found.scores[i]), found.boxes[i].tolist()) for i in people)


async def test_frames_of_one_batch_have_their_own_least_scores(
    inference: Inference, codec: Codec, astronaut: Frame
) -> None:
    coded = codec.encode(astronaut, 6)
    scores = []
    for seen in await asyncio.gather(*(inference.infer("gate", coded, [NETWORK], min_score=s) for s in (0.0, 0.5))):
        assert seen is not None
        scores.append(seen.outputs[0].detections.scores)
    assert float(scores[0].min()) < 0.1
    assert torch.equal(scores[1], scores[0][scores[0] >= 0.5])
    assert len(scores[1]) > 0


async def test_a_person_is_found_on_the_decoded_photograph_also_within_a_batch(
    inference: Inference, codec: Codec, astronaut: Frame
) -> None:
    coded = codec.encode(astronaut, 6)
    alone = await inference.infer("gate", coded, [NETWORK])
    assert alone is not None
    assert alone.batch_size == 1
    score, box = best_person(alone)
    assert score > 0.6
    left, top, right, bottom = box
    assert left < 150
    assert right > 300
    assert top < 60
    assert bottom > 450
    assert np.array_equal(alone.frame.rgb, codec.decode(coded).rgb)

    together = await asyncio.gather(*(inference.infer("gate", coded, [NETWORK]) for _ in range(5)))
    assert max(each.batch_size for each in together if each) == 4
    for each in together:
        score_then, box_then = best_person(each)
        assert score_then == pytest.approx(score, abs=0.05)
        assert box_then == pytest.approx(box, abs=8)


async def test_several_models_are_served_at_once_each_by_its_own_codec(
    inference: Inference, codec: Codec, other_codec: Codec, astronaut: Frame
) -> None:
    small = Frame(np.ascontiguousarray(astronaut.rgb[:128, 128:256]))
    coded: list[Bitstream] = [one.encode(small, 4) for one in (codec, other_codec, codec, other_codec)]
    assert len({one.model_id for one in coded}) == 2
    seen = await asyncio.gather(*(inference.infer(f"camera{i}", one, [NETWORK]) for i, one in enumerate(coded)))
    for one, each in zip(coded, seen, strict=True):
        assert each is not None
        expected = (codec if one.model_id == codec.model_id else other_codec).decode(one)
        assert np.abs(each.frame.rgb.astype(int) - expected.rgb).max() <= 1


async def test_an_unknown_model_or_task_is_refused_naming_what_there_is(
    inference: Inference, codec: Codec, spot: Bitstream
) -> None:
    with pytest.raises(UnknownModel, match=codec.model_id):
        await inference.infer("gate", dataclasses.replace(spot, model_id="0" * 64), [NETWORK])
    with pytest.raises(InvalidInput, match=NETWORK):
        await inference.infer("gate", spot, ["no-such-network"])
