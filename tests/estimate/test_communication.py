"""What devices send in a step: closed forms of rings, DDP and FSDP2, within a node and between nodes."""

import pytest

from flowmap.estimate.communication import Links, Sent, reduced, sent_in_a_step
from flowmap.estimate.networks import outline_of_network
from flowmap.estimate.price import StepPrice
from flowmap.estimate.roofline import Step, Traffic
from flowmap.nets import DiT
from flowmap.nets.blocks import blocks_of
from flowmap.recipe.settings import Trainer
from flowmap.samplers import Deterministic
from flowmap.student.config import StudentConfig


@pytest.fixture
def step():
    config = StudentConfig(net=DiT(preset="nano", patch=1), sampler=Deterministic(), shape=(1, 8, 8))
    student, teacher = (outline_of_network(config) for _ in range(2))
    return Step({}, student.requires_grad_(True), [teacher], student_calls=3, student_graded=1, teacher_calls=[2])


def weights(step):
    return sum(p.numel() for p in step.student.parameters())


def test_a_ring_sends_nothing_to_itself_and_twice_the_tensor_to_many():
    assert reduced(100.0, 1, 1) == Sent()
    assert reduced(100.0, 1000, 1).within == pytest.approx(2 * 100 * 0.999)
    assert reduced(100.0, 8, 4) == Sent(2 * 100 * 7 / 8, 2 * 100 / 8 * 3 / 4)
    assert Sent(400e9, 100e9).seconds(Links()) == 3 == Sent(200e9, 50e9).seconds(Links().halved)


def test_ddp_reduces_gradients_once_a_step(step):
    trainer = Trainer(devices=8, num_nodes=2, strategy="ddp")
    once, more = (sent_in_a_step(trainer, step, accumulate) for accumulate in (1, 4))
    assert once == more == reduced(4 * weights(step), 8, 2)
    assert sent_in_a_step(Trainer(), step, 1) == Sent()


def test_fsdp_gathers_for_each_pass_and_scatters_gradients_in_each_micro_batch(step):
    found = sent_in_a_step(Trainer(devices=4, strategy="fsdp"), step, 5)
    passes = 3 + 1 + 2 + 1  # forward, backward, of the teacher, gradients; each in float32
    assert found.within == pytest.approx(5 * 3 / 4 * passes * 4 * weights(step)) and found.between == 0
    half = sent_in_a_step(Trainer(devices=4, strategy="fsdp", precision="bf16"), step, 1)
    blocks = sum(p.numel() for block in blocks_of(step.student.net) for p in block.parameters())
    assert half.within <= 3 / 4 * (passes * 4 * weights(step) - 2 * 4 * blocks) * (1 + 1e-9)


def test_replicas_on_several_nodes_reduce_their_parts(step):
    one = sent_in_a_step(Trainer(devices=4, strategy="fsdp"), step, 1)
    two = sent_in_a_step(Trainer(devices=4, num_nodes=2, strategy="fsdp"), step, 1)
    assert two.within == one.within and two.between == pytest.approx(4 * weights(step) / 4)
    spread = sent_in_a_step(Trainer(devices=4, num_nodes=2, strategy="fsdp", shard_size=8), step, 1)
    assert spread.between == pytest.approx(7 * 4 * weights(step) / 4 / 2)


def test_communication_is_hidden_at_the_lower_end_and_added_at_the_upper():
    computed, sent = Traffic(1, 1.0, 1.0, seconds=2.0, slow_seconds=5.0), Sent(within=400e9)
    price = StepPrice(computed, sent)
    assert price.sending == (1.0, 2.0)
    assert (price.whole.seconds, price.whole.slow_seconds) == (2.0, 7.0)
    assert StepPrice(computed, sent + sent + sent).whole.seconds == 3.0
    assert "each device sends 400 GB within its node a step" in "\n".join(price.lines)
    assert len(StepPrice(computed, Sent()).lines) == 1
