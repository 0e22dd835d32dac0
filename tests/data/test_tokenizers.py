"""Tokenizers as the paper's models have them on the hub load with what this project installs."""

import io
import json

import sentencepiece
from transformers import AutoTokenizer


def test_a_sentencepiece_model_alone(tmp_path):
    """DeBERTa's folder has no tokenizer.json."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the quick brown fox jumps over {number} dogs" for number in range(200)]),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        user_defined_symbols=["[CLS]", "[SEP]"],
        pad_id=-1,
        minloglevel=2,
    )
    (tmp_path / "spm.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deberta-v2", "vocab_size": 128}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    itself = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    first, second = (itself.encode(text, out_type=str) for text in ("the fox", "jumps"))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the fox", "jumps")["input_ids"])
    assert tokens == ["[CLS]", *first, "[SEP]", *second, "[SEP]"]
