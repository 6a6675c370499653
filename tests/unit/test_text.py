from pathlib import Path

import pytest
import torch

from megasora.errors import ConfigError
from megasora.models.text import SmallTextEncoder, load_text_encoder, train_tokenizer

CAPTIONS = ["a rabbit in a green meadow", "two people ride bicycles", "a car phone"]


def test_the_tokenizer_is_repeatable_and_reads_anything() -> None:
    model = train_tokenizer(CAPTIONS, 512)
    assert model == train_tokenizer(CAPTIONS, 512)
    encoder = SmallTextEncoder(model, width=32)
    assert encoder.pieces.decode(encoder.pieces.encode("a rabbit")) == "a rabbit"
    assert 2 not in encoder.pieces.encode("漢字 é ß")  # bytes, not unknown
    assert [encoder.pieces.pad_id(), encoder.pieces.eos_id(), encoder.pieces.unk_id()] == [0, 1, 2]


def test_embeddings_have_their_valid_length_and_tell_captions_apart() -> None:
    encoder = SmallTextEncoder.create(CAPTIONS, width=32)
    texts = encoder.encode(["", *CAPTIONS, "a rabbit " * 500])
    embeddings = [text.tokens for text in texts]
    assert embeddings[0].shape == (1, 32)
    assert embeddings[-1].shape == (encoder.max_tokens, 32)
    assert embeddings[1].shape[0] == len(encoder.pieces.encode(CAPTIONS[0])) + 1
    assert torch.equal(embeddings[2], encoder.encode([CAPTIONS[1]])[0].tokens)
    means = torch.stack([e.mean(0) for e in embeddings[:4]])
    assert torch.pdist(means).min() > 0.1
    for text in texts:
        torch.testing.assert_close(text.pooled, text.tokens.sum(0) / len(text.tokens))
    assert encoder.width == encoder.pooled_width == 32


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    encoder = SmallTextEncoder.create(CAPTIONS, width=32, seed=1)
    encoder.save(tmp_path / "text")
    loaded = load_text_encoder(tmp_path / "text")
    assert loaded.fingerprint() == encoder.fingerprint()
    assert torch.equal(loaded.encode(CAPTIONS)[0].tokens, encoder.encode(CAPTIONS)[0].tokens)
    assert SmallTextEncoder.create(CAPTIONS, width=32, seed=2).fingerprint() != encoder.fingerprint()


def test_what_is_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no text encoder"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="is a 'bert'"):
        load_text_encoder(tmp_path)
