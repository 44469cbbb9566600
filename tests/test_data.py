"""Tokenizer, corpus, split, layout and order of the data, against plain versions of themselves."""
import json
import os
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
import torch

import common
import corpus
import data
import labeller
import masks
import tokenizer as tokenizer_file
import train_ppo
import train_rm
import train_sft
from conftest import STRUCTURES, random_examples, random_tokens
from errors import UserError

TEXTS = ["The cat sat on the mat, and the cat's hat sat on the cat.", "def merge_rows(rows):\n    return sum(rows)\n\n\n",
         "naïve café 12345 — ünïcödé \t tabs\nand   spaces  ", "<end><pad> is ordinary text"]


def plain_bpe(texts: list[str], n_merges: int) -> list[bytes]:
    """Byte-pair encoding with all pairs counted anew at every merge."""
    words = Counter(word for text in texts for word in regex.findall(tokenizer_file.PATTERN, text))
    words = [([bytes([b]) for b in word.encode()], count) for word, count in words.items()]
    merges = []
    for _ in range(n_merges):
        counts = Counter()
        for word, count in words:
            for pair in zip(word, word[1:]):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best[0] + best[1])
        for i, (word, count) in enumerate(words):
            j, merged = 0, []
            while j < len(word):
                if tuple(word[j:j + 2]) == best:
                    merged.append(word[j] + word[j + 1])
                    j += 2
                else:
                    merged.append(word[j])
                    j += 1
            words[i] = (merged, count)
    return merges


def test_a_line_may_hold_separators_of_lines_and_paragraphs(tmp_path):
    """JSON allows them raw in a string; they end no line of a .jsonl."""
    text = "one\u2028two\u2029three\x85four"
    line = json.dumps({"prompt": text, "response": "r"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8", newline="")
    assert [record.prompt for record in corpus.load_records(str(tmp_path / "d.jsonl"))] == [text, text]


def test_incremental_counts_give_the_plain_algorithms_merges():
    """The fast trainer and the plain loop choose the same merges in the same order."""
    ranks = tokenizer_file.train_bpe(TEXTS, 256 + len(tokenizer_file.SPECIALS) + 40)
    assert list(ranks)[256:] == list(dict.fromkeys(plain_bpe(TEXTS, 60)))[:40]
    assert list(ranks.values()) == list(range(len(ranks)))


@pytest.mark.parametrize("text", TEXTS + ["", " ", "\n\n", "日本語 text", "a" * 300])
def test_tiktoken_encodes_as_by_hand_and_decodes_back(text):
    """tiktoken with our ranks = the hand-written encoder; decoding gives the text back, whatever it looks
    like.
    """
    tokenizer = tokenizer_file.Tokenizer(tokenizer_file.train_bpe(TEXTS, 256 + len(tokenizer_file.SPECIALS) + 40))
    tokens = tokenizer.encode(text)
    assert tokens == tokenizer_file.encode_by_hand(text, tokenizer.ranks)
    assert tokenizer.decode(tokens) == text and max(tokens, default=0) < len(tokenizer.ranks)
    assert int(tokenizer.bytes_per_token()[tokens].sum()) == len(text.encode())


def test_tokenizer_file_round_trip(tokenizer, tmp_path):
    """Saved and loaded, a tokenizer has the same ranks and special tokens; pad, bos and end are three
    tokens.
    """
    tokenizer.save(tmp_path / "t.tiktoken")
    loaded = tokenizer_file.Tokenizer.load(tmp_path / "t.tiktoken")
    assert loaded.ranks == tokenizer.ranks and loaded.sentinels == tokenizer.sentinels
    assert len({loaded.pad, loaded.bos, loaded.end}) == 3 and isinstance(loaded.encoding, tiktoken.Encoding)


def test_a_tokenizer_of_another_size_is_trained_anew():
    """Of the same texts: the cache tells them apart."""
    records, least = [corpus.Record("f", text=TEXTS[0])], 256 + len(tokenizer_file.SPECIALS)
    assert [data.tokenizer_for(records, least + n).vocab for n in (2, 5)] == [least + 2, least + 5]


# ---- corpus ------------------------------------------------------------------------------------------------

def test_docstrings_are_found_with_their_signatures(tmp_path):
    """Functions, methods and classes come with signature, words and summary; what does not parse is passed
    over.
    """
    (tmp_path / "a.py").write_text('"""Module text here."""\nclass Box(Base):\n    """Hold things in a box."""\n'
                                   '    def get_item(self, key: int, *rest, flag=True, **options) -> int:\n'
                                   '        """Return the item of this key.\n\n        More."""\n'
                                   'async def _sendHTTP(x, /, y, *, z):\n    """Send it: :func:`~m.f`, ``z`` times. Then rest."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    (tmp_path / "said.py").write_bytes(b'# coding: latin-1\ndef said():\n    """Return a caf\xe9."""\n')
    (tmp_path / "mark.py").write_bytes(b'\xef\xbb\xbfdef marked():\n    """Return a marked one."""\n')
    many = "".join(f"elif x == {i}:\n    def f{i}():\n        'Return {i}.'\n" for i in range(1500))
    (tmp_path / "generated.py").write_text(f"if x:\n    pass\n{many}")
    (tmp_path / ".#a.py").symlink_to("nobody@nowhere")                        # an editor's lock
    records = {record.name: record for record in corpus.load_records(str(tmp_path))}
    assert records["get_item"].prompt == "def Box.get_item(self, key, *rest, flag, **options):\n# get item\n"
    assert records["get_item"].response == "Return the item of this key."
    assert records["get_item"].text.endswith("More.")
    assert records["_sendHTTP"].prompt.startswith("def _sendHTTP(x, y, *, z):\n# send http\n")
    assert records["_sendHTTP"].response == "Send it: `m.f`, `z` times."
    assert records["said"].text.endswith("caf\xe9.") and records["marked"].text.startswith("def marked():")
    assert records["f1499"].text.endswith("Return 1499.")
    assert records["Box"].response is None and records["Box"].text.startswith("class Box(Base):\n# box\n")


def test_a_docstring_of_two_words_is_no_summary():
    assert corpus.summary_line("Read it.") is None and corpus.summary_line("Read it all.") == "Read it all."


def test_scanning_twice_reads_the_cache(tmp_path, monkeypatch):
    """The second scan does not open the sources; one of another size, or of another time, is read again."""
    def scanned(summary: str, time: int) -> list[corpus.Record]:
        (tmp_path / "a.py").write_text(f'def f():\n    """{summary}"""\n')
        os.utime(tmp_path / "a.py", (time, time))
        return corpus.load_records(str(tmp_path))
    first = scanned("Return one of it.", 1)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "scan_file", None)
        assert corpus.load_records(str(tmp_path)) == first
    for summary, time in (("Return two of them.", 1), ("Return six of them.", 2)):
        assert scanned(summary, time)[-1].response == summary


def test_same_summary_counts_once(tmp_path):
    """Of two functions with one summary only the first is a pair, and so no summary crosses the split."""
    (tmp_path / "a.py").write_text('def f_one():\n    """Return the same thing."""\ndef f_two():\n    """Return the same thing."""\n')
    assert [record.response for record in corpus.load_records(str(tmp_path))] == ["Return the same thing.", None]


def test_split_is_by_name_and_keeps_what_was_held_out():
    """No name on both sides; about one in twenty; names that an earlier stage held out stay held out."""
    records = [corpus.Record(f"name{i % 1000}", text=str(i)) for i in range(3000)]
    train, held_out = corpus.split(records)
    assert not corpus.names_of(train) & corpus.names_of(held_out) and 20 < len(corpus.names_of(held_out)) < 90
    kept = {next(iter(corpus.names_of(train)))}
    assert kept <= corpus.names_of(corpus.split(records, kept)[1])
    train, held_out = corpus.split(records[:5], {f"name{i}" for i in range(5)})
    assert not train and len(held_out) == 5                        # to none of them may a later stage fit itself


@pytest.mark.parametrize("line, expected", [
    ({"text": "T"}, [("", "T")]),
    ({"prompt": "P", "response": "R"}, [("P", "R")]), ({"prompt": "P", "completion": "R"}, [("P", "R")]),
    ({"instruction": "I", "output": "O"}, [("I\n", "O")]),
    ({"instruction": "I", "input": "X", "output": "O"}, [("I\n\nX\n", "O")]),
    ({"instruction": "I", "input": " ", "output": "O"}, [("I\n", "O")]),
    ({"prompt": [{"role": "user", "content": "U"}], "completion": [{"role": "assistant", "content": "A"}]},
     [("\n\nHuman: U\n\nAssistant:", " A")]),
    ({"prompt": [{"role": "user", "content": "U"}], "completion": "A"}, [("\n\nHuman: U\n\nAssistant:", " A")]),
    ({"prompt": [{"role": "user", "content": "U"}]}, [("\n\nHuman: U\n\nAssistant:", None)]),
    ({"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"},
                   {"role": "user", "content": "V"}, {"role": "assistant", "content": "B"}]},
     [("\n\nHuman: U\n\nAssistant:", " A"), ("\n\nHuman: U\n\nAssistant: A\n\nHuman: V\n\nAssistant:", " B")]),
    ({"chosen": "\n\nHuman: U\n\nAssistant: A", "rejected": "\n\nHuman: U\n\nAssistant: B"},
     [("\n\nHuman: U\n\nAssistant:", " A")])])
def test_own_data_is_recognised_by_its_keys(line, expected, tmp_path):
    """Each format becomes prompts and answers; a dialogue of two replies becomes two pairs."""
    (tmp_path / "d.jsonl").write_text(json.dumps(line) + "\n")
    records = corpus.load_records(str(tmp_path / "d.jsonl"))
    assert [(r.prompt or "", r.response or r.chosen or r.text) for r in records] == expected


def test_a_dialogue_is_named_after_its_first_question(tmp_path):
    """Not after the greeting in front of it, which many begin with; an empty reply is not learnt from."""
    with open(tmp_path / "d.jsonl", "w") as file:
        for question in "UV":
            turns = (("assistant", "Hello."), ("user", question), ("assistant", " "))
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    records = corpus.load_records(str(tmp_path / "d.jsonl"))
    assert [record.response for record in records] == [" Hello.", "", " Hello.", ""]
    assert records[0].name == records[1].name != records[2].name == records[3].name


def test_a_digest_knows_names_and_contents_of_files(tmp_path):
    """A renamed file has other names held out. A dead link, as an editor leaves one, is passed over."""
    (tmp_path / "a.txt").write_text("One.")
    before = corpus.digest(str(tmp_path))
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    renamed = corpus.digest(str(tmp_path))
    (tmp_path / "b.txt").write_text("Two.")
    assert len({before, renamed, corpus.digest(str(tmp_path))}) == 3
    (tmp_path / "f.py").write_text('"""Three."""')
    sources = corpus.digest(str(tmp_path))
    (tmp_path / "g.py").symlink_to(tmp_path / "absent.py")
    assert corpus.digest(str(tmp_path)) == sources


def test_a_folder_is_its_jsonl_or_its_sources_or_its_texts(tmp_path):
    for name, content, texts in (("b.md", "Two.", ["Two."]), ("a.txt", "One.", ["One.", "Two."]),
                                 ("c.py", '"""Three."""', ["module f.c\nThree."]), ("d.jsonl", '{"text": "Four."}', ["Four."])):
        (tmp_path / "f").mkdir(exist_ok=True)
        (tmp_path / "f" / name).write_text(content)
        assert [record.text for record in corpus.load_records(str(tmp_path / "f"))] == texts


@pytest.mark.parametrize("line, fragment", [
    ({"messages": "hello"}, "role and content"), ({"messages": [{"role": "user", "content": "U"}]}, "no reply"),
    ({"chosen": "A", "rejected": "B"}, "one dialogue"), ({"prompt": "P", "response": ""}, "'response'")])
def test_own_data_that_cannot_be_used_is_named(line, fragment, tmp_path):
    """File and line are in the sentence."""
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "P"}) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=f"d.jsonl:2: .*{fragment}"):
        corpus.load_records(str(tmp_path / "d.jsonl"))


# ---- layout ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", ["causal", "prefix", "encdec"])
def test_every_example_can_be_read_back_from_the_batch(structure, tokenizer):
    """Tokens, positions, loss mask and last tokens of a packed batch, example by example."""
    examples = random_examples([(n % 7, [3 + n % 5]) for n in range(23)])
    batch = data.lay_out(examples, structure, 40, tokenizer)
    for i, example in enumerate(examples):
        source, (target,), where = example.source, example.targets, batch.document == i
        tokens = batch.tokens[where].tolist()
        begin = [tokenizer.bos] if structure == "encdec" else [tokenizer.bos] + source
        assert tokens == begin + target
        assert batch.positions[where].tolist() == list(range(len(tokens)))
        counted = where & batch.loss_mask
        assert batch.targets[counted].tolist() == target
        assert batch.tokens[where & batch.last].tolist() == target[-1:]
        if structure == "encdec":
            assert batch.source[batch.source_document == i].tolist() == [tokenizer.bos] + source
    assert int(batch.loss_mask.sum()) == sum(len(example.targets[0]) for example in examples)


OBJECTIVES = ("next_token", "prefix_lm", "span_corruption", "bart", "text_infilling", "sentence_permutation",
              "token_masking", "token_deletion", "document_rotation", "glm_spans", "glm_sentences",
              "glm_document", "glm_10b", "glm_130b", "ul2", "u_palm")


@pytest.mark.parametrize("structure", ["causal", "prefix", "encdec"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_can_be_laid_out_for_every_structure(name, structure, tokenizer):
    """What the batch counts are the tokens of the target that are predicted, and the source is all there."""
    objective, rng = data.objective_of(name, tokenizer, 64), np.random.default_rng(3)
    examples = [objective([*random_examples([(n, [])])[0][0], tokenizer.end], rng) for n in (1, 2, 9, 40, 60)]
    batch = data.lay_out(examples, structure, 80, tokenizer)
    start, sop = 0 if structure == "encdec" else 1, tokenizer.specials["<sop>"]
    for i, example in enumerate(examples):
        where = batch.document == i
        wanted = [token for token in example.targets[0] if token != sop]
        assert batch.targets[where & batch.loss_mask].tolist() == wanted
        read = batch.source[batch.source_document == i] if structure == "encdec" else batch.tokens[where]
        assert read.tolist()[:1 + len(example.source)] == [tokenizer.bos] + example.source
    assert batch.positions.min() >= 0 and (batch.document >= 0).any(1).all()


@pytest.mark.parametrize("structure", ["causal", "prefix"])
def test_blanks_stand_at_their_masks(structure, tokenizer):
    """GLM, Du et al. 2022, figure 2: a span reads <sop> and its tokens, predicts its tokens and <eop>; its first
    position is that of its mask, the second counts from 1; in the source the second is 0.
    """
    special = tokenizer.specials
    mask, sop, eop = special["<mask>"], special["<sop>"], special["<eop>"]
    source = [10, mask, 11, 12, mask]
    example = data.Example(source, [[sop, 20, 21, eop, sop, 30, eop]], blanks=(4, 1))
    batch = data.lay_out([example], structure, 100, tokenizer)
    assert batch.tokens[0].tolist() == [tokenizer.bos, *source, sop, 20, 21, sop, 30]
    assert batch.targets[batch.loss_mask].tolist() == [20, 21, eop, 30, eop]
    assert batch.loss_mask[0].tolist() == [False] * 6 + [True] * 5
    assert batch.positions_2d[:, 0].tolist() == [[0, 1, 2, 3, 4, 5, 5, 5, 5, 2, 2],
                                                 [0, 0, 0, 0, 0, 0, 1, 2, 3, 1, 2]]
    assert torch.equal(batch.positions, batch.positions_2d.sum(0))


def test_too_few_sentinels_are_refused_at_once(tokenizer):
    """A context that could need more sentinels than there are is refused before anything is drawn."""
    data.objective_of("ul2", tokenizer, 590)
    data.objective_of("span_corruption", tokenizer, 1900)
    for name, context in (("ul2", 700), ("u_palm", 700), ("span_corruption", 2200)):
        with pytest.raises(UserError, match="lower the context"):
            data.objective_of(name, tokenizer, context)


def test_a_dialogue_is_held_out_as_a_whole(tmp_path):
    """Its later prompts hold its earlier replies: they have one name, and go to one side."""
    turns = [{"role": role, "content": f"{role} says {i}"} for i in range(3) for role in ("user", "assistant")]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    records = corpus.load_records(str(tmp_path / "chat.jsonl"), False)
    assert len(records) == 3 and len({record.name for record in records}) == 1


@pytest.mark.parametrize("rule", [False, True], ids=("none", "all"))
def test_the_last_names_are_held_out_where_the_rule_holds_out_none_or_all(rule):
    """By name, not by record: one name is never on both sides."""
    names = [name for name in map(str, range(999)) if corpus.is_held_out(name) == rule][:4]
    train, held_out = corpus.split([corpus.Record(name, text=name) for name in names for _ in range(5)])
    assert {r.name for r in train} == set(names[:3]) and [r.name for r in held_out] == 5 * [names[3]]


@pytest.mark.parametrize("density, mean_span", [(0.1, 3), (0.5, 3), (0.15, 2), (0.15, 10), (0.5, 10)])
def test_t5s_other_rates_are_objectives_too(density, mean_span, tokenizer):
    """Raffel et al. 2020, tables 6 and 7: that share of the tokens is noise, in so many spans."""
    text, rng = random_examples([(200, [])])[0][0], np.random.default_rng(0)
    source, (target,), *_ = data.objective_of(f"span_corruption:{density}:{mean_span}", tokenizer, 256)(text, rng)
    spans = sum(token in tokenizer.sentinels for token in source)
    assert 200 - (len(source) - spans) == round(200 * density)
    assert spans == round(round(200 * density) / mean_span)


@pytest.mark.parametrize("name", ["span_corruption:0.5", "span_corruption:2:3", "span_corruption:0.5:0.2",
                                  "span_corruption:0.5:many", "span_corruption:0.5:nan", "prefix_lm:0.5:3", "next_token:1:2:3"])
def test_wrong_numbers_behind_an_objective_are_one_sentence(name, tokenizer):
    with pytest.raises(UserError, match=f"objective is '{name}'; two numbers may follow span_corruption"):
        data.objective_of(name, tokenizer, 64)


def test_half_a_character_in_a_docstring_is_passed_over(tmp_path):
    """Python may escape what UTF-8 cannot hold; the other docstrings of the file are read."""
    (tmp_path / "m.py").write_text('def f():\n    "Cut \\ud83d."\n\n\ndef g():\n    "Return a whole one."\n')
    assert [record.name for record in corpus.load_records(str(tmp_path / "m.py"))] == ["g"]


def test_a_name_that_is_no_text_is_passed_over(tmp_path):
    """Of such a file the module's own docstring alone is left out."""
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.py")).write_text('"""Module."""\ndef f():\n    "Return a whole one."\n')
    except OSError:                                             # a file system that takes no such names
        pytest.skip("no such names here")
    assert [record.name for record in corpus.load_records(str(tmp_path))] == ["f"]


def test_a_mark_in_front_is_no_text(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfdef area(x):\n")
    assert corpus.read_file(str(tmp_path / "prompts.txt")) == "def area(x):\n"


def test_many_files_make_a_long_name(tmp_path):
    files = [tmp_path / f"part_{i:03d}.jsonl" for i in range(40)]
    for i, file in enumerate(files):
        file.write_text(json.dumps({"text": f"Text {i}."}) + "\n")
    assert len(corpus.load_records(",".join(map(str, files)))) == 40


def test_an_objective_finds_its_tokens_in_a_published_tokenizer(tokenizer):
    """[MASK] and sop, as GLM's own vocabulary spells them; what is not there is named."""
    settings = tokenizer_file.own_settings(tokenizer.ranks)
    settings["specials"] = {"<end>": settings["end"], "[MASK]": 500, "[gMASK]": 501, "sop": 502, "eop": 503}
    published, rng = tokenizer_file.Tokenizer(tokenizer.ranks, settings), np.random.default_rng(0)
    text = random_examples([(40, [])])[0][0]
    example = data.objective_of("glm_130b", published, 64)(text, rng)
    assert {500, 501} & set(example.source) and {502, 503} <= set(example.targets[0])
    data.objective_of("prefix_lm", published, 64)
    for name, missing in (("glm_10b", "<smask>"), ("ul2", "<R>")):
        with pytest.raises(UserError, match=f"{name} wants a token {missing}"):
            data.objective_of(name, published, 64)


@pytest.mark.parametrize("chosen, rejected", [("b", "a" * 50), ("a" * 50, "b")])
def test_the_longest_answer_must_fit(chosen, rejected, tokenizer):
    """Whichever of the two it is, with its end token and what stands around; and it may just fit."""
    run = common.Run(None, torch.device("cpu"), torch.float32)
    record = corpus.Record("f", prompt="p", chosen=chosen, rejected=rejected)
    most = max(len(tokenizer.encode(text)) for text in (chosen, rejected)) + 2 + tokenizer.around
    rows = [data.token_rows(run, tokenizer, [record], ("prompt", "chosen", "rejected"), context)
            for context in (most - 1, most)]
    assert [len(row) for row in rows] == [0, 1]


def test_an_answer_fits_after_the_longest_prompt(tokenizer):
    """And the context is then full."""
    prompt = random_tokens(data.room_for_prompt(train_rm.Config(context=20, max_new=8), tokenizer))
    batch = data.lay_out([data.Example(prompt, [random_tokens(8)])], "causal", 1, tokenizer)
    assert int((batch.document >= 0).sum()) == 20


def test_a_row_of_several_answers_needs_a_tensor(tokenizer):
    """One source in a row is not enough for the plain causal mask: its answers would see each other."""
    batch = data.lay_out([data.Example([1, 2], [[3, 4], [5]])], "causal", 1, tokenizer)
    assert not batch.one_per_row and isinstance(masks.of_batch("causal", batch).attention, torch.Tensor)


@pytest.mark.parametrize("row_length, shared", [(11, [1, 1, 1, 1, 1]), (12, [2, 2, 1])])
def test_answers_share_a_prompt_while_the_row_has_room(row_length, shared, tokenizer):
    """<bos> 1, and 2 with an answer behind it twice, are twelve tokens."""
    examples = data.answers_of_prompts([[1, 2]] * 5, [[3] * 4] * 5, "causal", row_length, tokenizer)
    assert [len(example.targets) for example in examples] == shared


def test_the_first_token_belongs_to_its_answer(tokenizer):
    """Though the last token of the prompt predicts it."""
    examples = [data.Example([1, 2], [[3, 4]]), data.Example([5], [[6, 7, 8]])]
    batch = data.lay_out(examples, "causal", 99, tokenizer)
    assert sorted(data.answer_of_token(batch, batch.loss_mask).tolist()) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("stage", [train_sft, train_rm, train_ppo])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_little_padding(stage, structure, tokenizer):
    """At most 5 % of the computed tokens are padding, as each stage lays its sequences out by default."""
    config, rng, padding, everything = stage.Config(), np.random.default_rng(0), 0, 0
    n, answers = {train_sft: (32, 1), train_rm: (8, 6), train_ppo: (16, 4)}[stage]
    for _ in range(30):
        examples = random_examples([(int(rng.integers(15, 60)), rng.integers(8, 32, answers)) for _ in range(n)])
        if stage is train_ppo:
            examples = data.answers_of_prompts([example.source for example in examples for _ in range(answers)],
                                               [target for example in examples for target in example.targets],
                                               structure, config.row, tokenizer)
        more, all_tokens = data.lay_out(examples, structure, config.row, tokenizer).padding()
        padding, everything = padding + more, everything + all_tokens
    assert padding / everything <= 0.05, padding / everything


@pytest.mark.parametrize("text", ["a line of words\n" * 3000, "word " * 5000, "x" * 9000,
                                  "a paragraph\n\n" * 2000, "short", "word " * 80, "\n\nword " * 700 + "\nx" * 4000])
def test_any_text_becomes_documents(text):
    """With blank lines or without, nothing of it is lost, and a long one has several, to hold one out."""
    records = corpus.read_text("a.txt", text)
    assert "".join("".join(record.text.split()) for record in records) == "".join(text.split())
    assert max(len(record.text) for record in records) <= 4002
    assert (len(records) > 1) == (len(text) > 200) and len(records) >= min(10, len(text) / 200)
    assert len({record.name for record in records}) == len(records)
    if "\n\n" not in text:
        assert "".join(record.text for record in records) == text


def test_rows_are_about_as_long_as_asked_for():
    """No example is lost or doubled, and no row of small examples is much longer than asked for."""
    rng = np.random.default_rng(1)
    for n in (1, 2, 5, 40):
        sizes = [(int(size),) for size in rng.integers(5, 30, n)]
        rows = data.balanced_rows(sizes, 60)
        assert sorted(i for row in rows for i in row) == list(range(n))
        assert max(sum(sizes[i][0] for i in row) for row in rows) <= 60 * 4 / 3 + 30


@pytest.mark.parametrize("size", [(256,), (2, 256), (240, 40)])
def test_full_rows_hold_one_example_each(size):
    """Several would cost no less, and attend more."""
    assert data.balanced_rows([size] * 16, 256) == [[i] for i in range(16)]


@pytest.mark.parametrize("source_weight", [0.0, 0.5, 1.0])
def test_source_weights_count_source_tokens_of_the_causal_decoder_alone(source_weight, tokenizer):
    """Every source token that follows another one has the weight: at 0 the targets count alone, at 1 all that is
    predicted alike. prefix and encdec have no source token to predict.
    """
    examples = random_examples([(3, [2]), (0, [4])])
    for structure in STRUCTURES:
        batch = data.lay_out(examples, structure, 64, tokenizer)
        weights = data.loss_weights(batch, structure, source_weight)
        assert float(weights.sum()) == 6 + 3 * source_weight * (structure == "causal")
        assert torch.equal(weights == 1, batch.loss_mask) or (structure, source_weight) == ("causal", 1.0)
        assert not weights[batch.document < 0].any()


def test_an_epoch_reads_everything_once_in_an_order_of_its_own():
    """Steps of one epoch do not overlap, epochs differ in order, and the order is a function of the seed."""
    sizes = np.ones(100, dtype=int)
    epochs = [[data.indices_of_step(sizes, 10, 7, step)[0].tolist() for step in range(k, k + 10)] for k in (0, 10)]
    for epoch in epochs:
        assert sorted(i for chosen in epoch for i in chosen) == list(range(100))
    assert epochs[0] != epochs[1]
    assert epochs[0][3] == data.indices_of_step(sizes, 10, 7, 3)[0].tolist()


def test_every_step_draws_by_itself():
    """Its generator is no other step's, nor that of another seed."""
    sizes = np.ones(100, dtype=int)
    draws = {data.indices_of_step(sizes, 10, seed, step)[1].random() for seed in (7, 8) for step in (0, 1, 10)}
    assert len(draws) == 6


def test_preferences_drop_ties_and_absent_answers():
    """[p, w, l] is True exactly where w is ranked before l by at least the tie."""
    groups = [data.Example([], [[1], [2], [3]], (), (0.5, 0.45, 0.9)), data.Example([], [[1], [2]], (), (0.0, 0.25))]
    preference = data.preferences(groups, 0.25)
    expected = {(0, 2, 0), (0, 2, 1), (1, 1, 0)}
    assert {tuple(index) for index in preference.nonzero().tolist()} == expected


# ---- the labeller ------------------------------------------------------------------------------------------

def test_every_part_of_the_guideline():
    """Each part of the gold score on lines where it is plain what it should be."""
    prompt = corpus.function_prompt("def convert_color_map(x):")
    assert labeller.command("Return it.") == 1 and labeller.command("Returns it.") == 0 and labeller.command("") == 0
    assert labeller.about(prompt, "Converting the colors by a map.") == 1
    assert labeller.about(prompt, "Convert it.") == pytest.approx(1 / 3)
    assert labeller.sentence("Do it.") == 1 and labeller.sentence("do it") == 0 and labeller.sentence("Do it") == 0.5
    assert [labeller.length("w " * n) for n in (0, 3, 10, 13, 16, 30)] == pytest.approx([0, 1, 1, 0.5, 0, 0])
    judge = labeller.Labeller(["return the color map map"] * 3)
    parts = judge.parts(prompt, "return the blorb map map")
    assert parts["words"] == pytest.approx((4 / 5) ** 2) and parts["no_repetition"] == pytest.approx((3 / 4) ** 2)
    assert judge.gold(prompt, "") == 0 < judge.gold(prompt, "Blorb") < judge.gold(prompt, "Convert the color map.") <= 1


def test_gold_is_the_weighted_mean():
    """Half a point for the capital, one word in three of the name, two words where three are wanted."""
    gold = labeller.Labeller(["convert it"] * 3).gold("def convert_color_map(x):\n", "Convert it")
    assert gold == pytest.approx((2 + 2 / 3 + 0.5 + 2 / 3 + 1 + 1) / 8)


def test_known_words_occur_three_times():
    """Within identifiers too."""
    assert labeller.known_words(["row row_count", "count row to"]) == ["row"]


def test_a_stem_has_three_letters():
    assert [labeller.stem(word) for word in ("uses", "converts", "keys")] == ["use", "convert", "key"]


def test_stop_words_of_a_name_need_not_be_said():
    assert labeller.about("def sum_of_rows(x):\n", "Sum the rows.") == 1


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("n", [3, 130, 150])
def test_the_example_on_the_screen_has_no_padding(structure, n, tokenizer):
    """A row is rounded up in length; what is shown is the example, whole."""
    source, target = [tokenizer.encode("a")[0]] * n, [tokenizer.encode("b")[0]] * n + [tokenizer.end]
    for example in (data.Example(source, [target]), data.Example([], [target])):
        shown = data.show(example, structure, tokenizer)
        assert "<pad>" not in shown and shown.count("a") == len(example.source) and shown.count("b") - shown.count("<bos>") == n
