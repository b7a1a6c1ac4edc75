"""What the model does for methods that act or read elsewhere than on the audio tokens alone."""

import pytest
import torch
from tiny import EOS, Batch, make_thinker

from audiopress import CompressedOmni, build
from audiopress.compression.base import Compressor, CompressorConfig, Sizes
from audiopress.compression.budget import token_budget
from audiopress.compression.chain import Chain
from audiopress.compression.encoder import EncoderConfig
from audiopress.kernels import top_k
from audiopress.models import parts
from audiopress.models.layout import Kind
from audiopress.models.loading import build_for
from audiopress.models.rewrite import IGNORE

from .test_tower import FirstOfBlock

GREEDY = {"max_new_tokens": 6, "eos_token_id": [EOS]}


class Spy(Compressor):
    """Keeps the first tokens, remembers what it was given, and may rewrite the prompt."""

    name = "spy"

    def __init__(self, stage="connector", needs=(), keep_ratio=0.5, rewrites=False, proportional=False, sections=None):
        super().__init__(CompressorConfig(keep_ratio), Sizes(32, 24))
        self.stage = stage
        self.asked = frozenset(needs)
        self.rewrites, self.proportional, self.sections = rewrites, proportional, sections
        self.trained = False

    needs = property(lambda self: self.asked)
    proportional_attention = property(lambda self: self.proportional)
    rope_sections = property(lambda self: self.sections)

    def compress(self, stream, context):
        self.stream, self.context = stream, context
        budget = self.budget(stream.lengths)
        index = top_k(-stream.positions.float(), stream.lengths, budget)
        out = stream.select(index, budget)
        if self.rewrites:
            out = out.replace(prompt=context.prompt.stream.embeds * 2 + context.prompt.stream.embeds.mean())
        return out.replace(sizes=out.sizes * 3) if self.proportional else out


def dialogue(side="right", answers=True, seed=0, change=0):
    """Two samples: sound in video with two rounds, and audio with one; the ids are 1 to 89, a turn ends with EOS."""
    b = Batch(seed)
    system, question, answer, later, last = [1, 2, EOS, 3], [11, 12, 13], [21, 22, EOS], [31, 32, EOS], [41, EOS]
    answer = [a + change if a != EOS else a for a in answer]
    tail = [*answer, *later, *last] if answers else []
    b.add(system, b.video_with_audio(2, 4, 4, 300, 2.0), question, [EOS, 5], tail)
    b.add(system, b.audio(203), [14, 15], b.audio(64), [16, EOS, 5], answer if answers else [])
    batch = b.build(side)
    if answers:
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for row in range(2):
            ids = batch["input_ids"][row]
            for value in (*answer[:2], *([41] if row == 0 else [])):
                labels[row, ids == value] = value
        batch["labels"] = labels
    return batch


@pytest.fixture(scope="module")
def thinker():
    return make_thinker()


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("answers", [True, False])
def test_the_question_is_the_words_after_the_media_of_its_turn(thinker, side, answers):
    spy = Spy(needs={"question"})
    CompressedOmni(thinker, spy).encode(**dialogue(side, answers))
    embed = thinker.get_input_embeddings()
    want = [[11, 12, 13], [14, 15, 16], [14, 15, 16]]  # one per audio clip
    assert spy.context.question.lengths == (3, 3, 3)
    assert torch.equal(spy.context.question.embeds, embed(torch.tensor(want).flatten()))


@torch.no_grad()
def test_a_joint_method_reads_a_sample_as_one_stream(thinker):
    spy = Spy("joint", {"prompt", "encoder_attention"})
    batch = dialogue()
    inputs, stream = CompressedOmni(thinker, spy).encode(**batch)
    layout, scene = inputs.before, spy.context.scene
    media = (layout.kind == Kind.AUDIO) | (layout.kind == Kind.VIDEO)
    assert spy.stream.lengths == tuple(media.sum(dim=1).tolist())
    assert scene.is_video.sum() == 8
    assert torch.equal(scene.positions, layout.positions[:, media])
    assert torch.equal(scene.seconds, layout.second[media])
    assert torch.equal(scene.sources[~scene.is_video].unique(), torch.arange(3))
    received = spy.context.encoder_attention
    assert (received[scene.is_video] == 0).all()
    assert float(received[~scene.is_video].mean()) == pytest.approx(1, abs=0.1)
    prompt = layout.mask & ~media & (batch["labels"] == IGNORE)
    assert torch.equal(spy.context.prompt.positions, layout.positions[:, prompt])
    assert torch.equal(spy.context.prompt.stream.embeds, thinker.get_input_embeddings()(batch["input_ids"])[prompt])
    # what is left: every text token, and the first half of each sample's media, at the positions they had
    assert [int((row != Kind.TEXT).sum() - (row == Kind.PAD).sum()) for row in inputs.layout.kind] == list(
        stream.lengths
    )
    assert inputs.count(Kind.VIDEO)[0] == 8
    kept = [layout.positions[:, b, media[b]][:, : stream.lengths[b]] for b in range(2)]
    for b in range(2):
        row = (inputs.layout.kind[b] == Kind.AUDIO) | (inputs.layout.kind[b] == Kind.VIDEO)
        assert torch.equal(inputs.positions[1:, b, row], kept[b])


@torch.no_grad()
@pytest.mark.parametrize("stage", ["connector", "joint"])
def test_no_method_reads_answers(thinker, stage):
    needs = {"question", "prompt"} if stage == "joint" else {"question", "video"}
    first, second = Spy(stage, needs, rewrites=stage == "joint"), Spy(stage, needs, rewrites=stage == "joint")
    a, _ = CompressedOmni(thinker, first).encode(**dialogue())
    b, _ = CompressedOmni(thinker, second).encode(**dialogue(change=40))
    assert not torch.equal(a.embeds, b.embeds), "the answers themselves differ"
    answers = a.labels != IGNORE
    assert torch.equal(a.embeds[~answers], b.embeds[~answers])
    assert torch.equal(first.context.question.embeds, second.context.question.embeds)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_rewritten_prompt_is_what_the_llm_reads(thinker, side):
    spy = Spy("joint", {"prompt"}, rewrites=True)
    batch = dialogue(side)
    inputs, stream = CompressedOmni(thinker, spy).encode(**batch)
    for b in range(2):
        row = (inputs.layout.kind[b] == Kind.TEXT) & (inputs.labels[b] == IGNORE)
        lengths = spy.context.prompt.stream.lengths
        want = stream.prompt.split(lengths)[b]
        assert torch.equal(inputs.embeds[b, row], want)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"stage": "joint", "needs": {"prompt"}, "rewrites": True},
        {"proportional": True},
        {"stage": "joint", "proportional": True, "sections": (3, 2, 2, 1)},
    ],
    ids=str,
)
def test_decoding_equals_recomputing_and_batch_equals_samples(thinker, options):
    model = CompressedOmni(thinker, Spy(**options)).eval()
    batch = dialogue("left", answers=False)
    cached = model.generate(**batch, **GREEDY)
    assert torch.equal(cached, model.generate(**batch, **GREEDY, use_cache=False))
    assert parts.language_model(thinker).rotary_emb.mrope_section == [4, 2, 2], "as before"
    # the first token by the plain way: logits of the whole prompt
    logits = model(**dialogue("right", answers=False))
    last = [int(m.sum()) - 1 for m in model.encode(**dialogue("right", answers=False))[0].mask]
    first = [int(row[i].argmax()) for row, i in zip(logits.logits, last, strict=True)]
    assert cached[:, 0].tolist() == first


@torch.no_grad()
def test_services_change_what_the_llm_computes(thinker):
    batch = dialogue()
    logits = [
        CompressedOmni(thinker, Spy(**o))(**batch).logits
        for o in ({}, {"proportional": True}, {"sections": (2, 2, 2, 2)})
    ]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    assert torch.equal(CompressedOmni(thinker, Spy())(**batch).logits, logits[0])


@torch.no_grad()
def test_a_joint_method_without_audio_or_without_video(thinker):
    spy = Spy("joint", {"prompt", "encoder_attention"})
    b = Batch()
    b.add(b.text(2), b.video(2, 4, 8), b.text(3))
    inputs, _ = CompressedOmni(thinker, spy).encode(**b.build())
    assert inputs.count(Kind.VIDEO) == (16, 8)
    b = Batch()
    b.add(b.text(2), b.audio(203), b.text(3)).add(b.text(5))
    inputs, _ = CompressedOmni(thinker, spy).encode(**b.build())
    assert inputs.count(Kind.AUDIO) == (51, 26)
    assert spy.stream.lengths == (51, 0)


@torch.no_grad()
def test_video_beside_the_audio(thinker):
    spy = Spy(needs={"video"})
    batch = dialogue()
    CompressedOmni(thinker, spy).encode(**batch)
    assert spy.context.video.lengths == (8, 0, 0)
    assert spy.context.video_seconds.tolist() == [0.0] * 4 + [2.0] * 4


@torch.no_grad()
@pytest.mark.parametrize("method", ["uniform-stride", "random", "pooling"])
def test_video_tokens_have_a_control_of_their_own(thinker, method):
    audio = build("pooling", hidden_size=32, keep_ratio=0.3)
    video = build(method, hidden_size=32, keep_ratio=0.25)
    model = CompressedOmni(thinker, audio, video_compressor=video)
    out = model(**dialogue())
    assert out.tokens["video"] == (8, 2)
    assert out.tokens["audio"] == (75 + 51 + 16, sum(token_budget((75, 51, 16), 0.3)))
    alone = CompressedOmni(thinker, None, video_compressor=video)(**dialogue())
    assert alone.tokens == {"audio": (142, 142), "video": (8, 2)}


def test_a_video_control_that_cannot_be(thinker):
    for bad, message in (
        (build("stacking", hidden_size=32), "training-free method that reads them alone, got stacking"),
        (Spy("joint"), "training-free method"),
        (build("random", hidden_size=16), "built for width 16"),
    ):
        with pytest.raises(ValueError, match=message):
            CompressedOmni(thinker, None, video_compressor=bad)
    with pytest.raises(ValueError, match="reduces video itself"):
        CompressedOmni(thinker, Spy("joint"), video_compressor=build("random", hidden_size=32))


def test_training_draws_a_ratio_per_step(thinker):
    model = CompressedOmni(thinker, build("pooling", hidden_size=32, keep_ratio=0.5))
    model.set_keep_ratios((0.5, 0.25, 0.125))
    model.train()

    def kept(step):
        model.step = step
        return model(**dialogue()).tokens["audio"][1]

    with torch.no_grad():
        drawn = [kept(step) for step in range(12)]
        assert [kept(step) for step in range(12)] == drawn, "the same in every process and batch of a step"
        want = {sum(token_budget((75, 51, 16), r)) for r in (0.5, 0.25, 0.125)}
        assert set(drawn) == want
        assert model.eval()(**dialogue()).tokens["audio"][1] == max(want)
    with pytest.raises(ValueError, match="weights of its own for every keep_ratio"):
        CompressedOmni(thinker, build("stacking", hidden_size=32)).set_keep_ratios((0.5, 0.25))
    with pytest.raises(ValueError, match="keep_ratios need a compressor"):
        CompressedOmni(thinker).set_keep_ratios((0.5,))


def test_a_method_inside_that_the_tower_is_not_deep_enough_for(thinker):
    message = "layers must be from 1 to the tower's 2, got 6"
    with pytest.raises(ValueError, match=message):
        build_for(thinker, "atome:encoder")
    with pytest.raises(ValueError, match=message):
        CompressedOmni(thinker, build("atome:encoder", hidden_size=32, encoder_size=24))


def test_a_ratio_that_shrinks(thinker):
    """To that ratio exactly: 1 - (1 - 0.1) is less than 0.1, and rounds half a token the other way."""
    model = CompressedOmni(thinker, build("uniform-stride", hidden_size=32, keep_ratio=0.1))
    model.set_keep_ratios((0.1,))
    for model.shrinkage, ratio in ((0.0, 1.0), (0.5, 0.55), (1.0, 0.1)):
        assert model.eval().drawn_compressor() is model.compressor
        assert model.train().drawn_compressor().config.keep_ratio == ratio


@torch.no_grad()
def test_what_is_drawn_at_random_follows_the_seed_and_changes_in_training(thinker):
    model = CompressedOmni(thinker, build("random", hidden_size=32)).eval()

    def slots():
        return model.encode(**dialogue())[1].slots

    first = slots()
    assert torch.equal(slots(), first)
    model.seed = 1
    assert not torch.equal(slots(), first)
    model.train()
    model.step = 5
    drawn = slots()
    assert torch.equal(slots(), drawn)
    model.step = 6
    assert not torch.equal(slots(), drawn)
    model.eval()


@torch.no_grad()
def test_a_chain_from_the_tower_on(thinker):
    inside = FirstOfBlock(EncoderConfig(0.5, stage="encoder"), Sizes(32, 24))
    chain = Chain([inside, build("pooling", hidden_size=32, encoder_size=24, keep_ratio=0.5)])
    assert chain.stage == "encoder"
    assert chain.config.keep_ratio == 0.25
    longer = Chain([chain, build("uniform-stride", hidden_size=32, encoder_size=24, keep_ratio=0.5)])
    assert longer.name == "first-of-block+pooling+uniform-stride"
    for model in (chain, longer):
        out = CompressedOmni(thinker, model)(**dialogue())
        assert out.tokens["audio"][1] == sum(model.budget((75, 51, 16)))
    with pytest.raises(ValueError, match="one of 'encoder' as its first"):
        Chain([build("pooling", hidden_size=32, encoder_size=24), inside])
    with pytest.raises(ValueError, match="acts inside the audio tower"):
        inside(None)
