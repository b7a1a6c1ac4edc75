"""Proportional attention against copies of the keys, against an additive mask, in prefill and in decoding."""

import pytest
import torch
from tiny import EOS, make_thinker
from transformers import WhisperConfig, WhisperModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from audiopress.kernels.attention import causal_attention
from audiopress.models import attention, parts
from audiopress.models.attention import PREFIX, biased, biased_llm, enable_key_bias, rope_sections, size_bias


def language_model(implementation="sdpa"):
    thinker = make_thinker()
    lm = parts.language_model(thinker)
    lm.config._attn_implementation = implementation
    return thinker.eval(), lm


def with_mask(lm, embeds, positions, bias):
    """The same by an additive mask of queries times keys, in eager attention."""
    length = embeds.shape[1]
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
    lm.config._attn_implementation = "eager"
    mask = {"full_attention": causal + bias[:, None, None, :]}
    return lm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state


def inputs(batch=2, length=9, width=32):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch, length, width, generator=generator)
    sizes = torch.randint(1, 9, (batch, length), generator=generator).float()
    return embeds, torch.arange(length).expand(4, batch, -1), sizes


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_biased_key_is_as_good_as_its_copies(implementation):
    _, lm = language_model(implementation)
    attention = lm.layers[0].self_attn
    enable_key_bias(lm.config)
    embeds, _, sizes = inputs(1, 5)
    copies = sizes[0].long()
    query = embeds[:, :3]

    def attend(keys, bias):
        q = attention.q_proj(query).view(1, 3, 2, 16).transpose(1, 2)
        k, v = (p(keys).view(1, -1, 1, 16).transpose(1, 2) for p in (attention.k_proj, attention.v_proj))
        function = ALL_ATTENTION_FUNCTIONS[lm.config._attn_implementation]
        options = {"scaling": attention.scaling, "key_bias": bias, "is_causal": False}
        return function(attention, q, k, v, None, **options)[0]

    many = attend(embeds.repeat_interleave(copies, dim=1), None)
    torch.testing.assert_close(attend(embeds, copies.float().log()[None]), many, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_an_additive_mask(implementation):
    _, lm = language_model(implementation)
    embeds, positions, sizes = inputs()
    enable_key_bias(lm.config)
    with biased_llm(lm, sizes.log()):
        found = lm(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found, with_mask(lm, embeds, positions, sizes.log()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
@pytest.mark.parametrize("biases", [True, False])
def test_flash_attention_finds_its_kernels(monkeypatch, name, biases):
    _, lm = language_model(name)
    seen = []

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        seen.append((module.config._attn_implementation, query.shape[-1]))
        return value.repeat_interleave(2, dim=1).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, attend)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, lambda *a, **k: None)
    enable_key_bias(lm.config)
    embeds, positions, sizes = inputs()
    with biased_llm(lm, sizes.log() if biases else None):
        lm(inputs_embeds=embeds, position_ids=positions)
    assert seen == [(name, 24 if biases else 16)] * 2, "it looks its kernels up by the config's name"
    assert lm.config._attn_implementation == PREFIX + name


def test_without_sizes_nothing_changes():
    _, lm = language_model()
    embeds, positions, _ = inputs()
    want = lm(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    enable_key_bias(lm.config)
    assert torch.equal(lm(inputs_embeds=embeds, position_ids=positions).last_hidden_state, want)
    with biased_llm(lm, torch.zeros(2, 9)):
        torch.testing.assert_close(lm(inputs_embeds=embeds, position_ids=positions).last_hidden_state, want)
    assert not lm._forward_pre_hooks


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("beams", [1, 2])
def test_decoding_equals_recomputing(cache, beams):
    thinker, lm = language_model()
    enable_key_bias(lm.config)
    embeds, positions, sizes = inputs()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    bias = size_bias(sizes, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0).expand(4, -1, -1)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "cache_implementation": cache}
    with biased_llm(lm, bias):
        cached, again = (
            thinker.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=positions,
                use_cache=use,
                eos_token_id=[EOS],
                **(options if use else options | {"cache_implementation": None}),
            )
            for use in (True, False)
        )
    assert torch.equal(cached, again)
    without = thinker.generate(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **options)
    assert cached.shape == without.shape


def test_training_with_checkpointing_gives_the_same_gradients():
    thinker, lm = language_model()
    enable_key_bias(lm.config)
    embeds, positions, sizes = inputs()
    gradients = []
    for checkpointing in (False, True):
        thinker.train()
        if checkpointing:
            enable = getattr(thinker, "activation_checkpointing_enable", thinker.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        x = embeds.clone().requires_grad_(True)
        with biased_llm(lm, sizes.log()):
            out = lm(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state
        out.square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_bfloat16_loses_little():
    _, lm = language_model()
    enable_key_bias(lm.config)
    embeds, positions, sizes = inputs()
    outs = []
    for dtype in (torch.float32, torch.bfloat16):
        lm.to(dtype)
        with biased_llm(lm, (100 * sizes).log()):
            outs.append(lm(inputs_embeds=embeds.to(dtype), position_ids=positions).last_hidden_state.float())
    torch.testing.assert_close(*outs, rtol=0.05, atol=0.05)


def test_rope_sections():
    _, lm = language_model()
    embeds, positions, _ = inputs()
    positions = positions.clone()
    positions[1:] = torch.randint(0, 50, (3, 2, 9), generator=torch.Generator().manual_seed(1))
    want = lm(inputs_embeds=embeds, position_ids=positions).last_hidden_state
    with rope_sections(lm, (4, 2, 2)):  # its own
        assert torch.equal(lm(inputs_embeds=embeds, position_ids=positions).last_hidden_state, want)
    with rope_sections(lm, (2, 2, 2, 2)):
        cos, _ = lm.rotary_emb(embeds, positions[1:])
        assert not torch.allclose(lm(inputs_embeds=embeds, position_ids=positions).last_hidden_state, want)
    angle = positions[1:, :, :, None] * lm.rotary_emb.inv_freq
    rows = [0, 0, 1, 1, 2, 2, 0, 0]
    torch.testing.assert_close(cos[..., :8], torch.stack([angle[r, ..., i] for i, r in enumerate(rows)], dim=-1).cos())
    assert torch.equal(lm(inputs_embeds=embeds, position_ids=positions).last_hidden_state, want)
    with (
        pytest.raises(ValueError, match=r"must sum to half the head size, 8, got \(9, 9, 9, 5\)"),
        rope_sections(lm, (9, 9, 9, 5)),
    ):
        pass


def test_a_decoder_that_reads_the_tokens():
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8}
    ids = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = WhisperConfig(encoder_layers=1, decoder_layers=2, max_source_positions=20, **heads, **widths, **ids)
    torch.manual_seed(0)
    decoder = WhisperModel(config).decoder.eval()
    states, copies = torch.randn(1, 4, 16), torch.tensor([3, 1, 2, 5])
    ids = torch.tensor([[1, 7, 9]])
    want = decoder(ids, encoder_hidden_states=states.repeat_interleave(copies, dim=1)).last_hidden_state
    enable_key_bias(decoder.config)
    with biased([layer.encoder_attn for layer in decoder.layers], copies.float().log()[None]):
        found = decoder(ids, encoder_hidden_states=states).last_hidden_state
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("biases", [True, False])
@torch.no_grad()
def test_a_prompt_takes_our_kernel(biases, monkeypatch):
    """At the 7B model's head sizes, in bfloat16, with a cache that is longer than the prompt, against float64."""
    calls = []
    monkeypatch.setattr(attention, "causal_attention", lambda *args: calls.append(args) or causal_attention(*args))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 700, 128, generator=generator).cuda().bfloat16() for heads in (28, 4, 4))
    bias = torch.randint(1, 60, (1, 700), generator=generator).float().log().cuda()
    _, lm = language_model()
    enable_key_bias(lm.config)
    lm.layers[0].self_attn.num_key_value_groups = 7
    cached = (torch.cat([x, x[:, :, :68]], dim=2) for x in (k, v))
    options = {"scaling": 128**-0.5, "key_bias": bias if biases else None}
    attend = ALL_ATTENTION_FUNCTIONS[lm.config._attn_implementation]
    found, _ = attend(lm.layers[0].self_attn, q, *cached, None, **options)
    assert len(calls) == 1
    q, k, v = q.double(), k.double().repeat_interleave(7, 1), v.double().repeat_interleave(7, 1)
    logits = q @ k.mT * 128**-0.5 + bias.double() * biases
    causal = torch.ones(700, 700, device="cuda", dtype=torch.bool).triu(1)
    want = logits.masked_fill(causal, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(found.transpose(1, 2).double(), want, rtol=0.02, atol=0.01)
