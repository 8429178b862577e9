"""One small valid file of each published layout, written for the tests; shared by the reader and fuzz tests."""

import json
import struct
from typing import Any

from perlhf.data.containers.tfrecord import crc32c

GREETING = {"role": "agent", "text": "Welcome!"}
REWARD_ROW: dict[str, Any] = {
    "conversation_id": "a",
    "context": json.dumps(
        [
            GREETING,
            {"role": "user", "text": "Two lattes, please!"},
            {"role": "agent", "api": {"get_menu_items": {"query": "café"}}},
            {"role": "api", "response": {"get_menu_items": {"items": []}}},
        ]
    ),
    "generation": json.dumps({"role": "agent", "text": "Hot or iced?"}),
    "reward": 1.0,
}


def note(name: str, value: str, context: str) -> dict[str, str]:
    return {"name": name, "value": value, "context": context}


DIALOG_ROW: dict[str, Any] = {
    "conversation_id": "d",
    "vertical": "Coffee",
    "utterances": [
        {
            "speaker": "user",
            "text": "A mocha.",
            "annotations": [
                note("api_call", "get_menu_items", "api_call_0"),
                note("request", '{"query": "mocha"}', "api_call_0"),
                note("api_response", "get_menu_items", "api_response_0"),
                note("response", '{"menu_items":[{"menu_item_id":""mocha-1"","name":"Mocha"}]}', "api_response_0"),
                note("api_call", "show_menu", "api_call_1"),
                note("api_response", "show_menu", "api_response_1"),
                note("response", '{"menu_items":["Mocha"]}', "api_response_1"),
            ],
        },
        {"speaker": "assistant", "text": "Here you are.", "annotations": []},
        {"speaker": "user", "text": "Thanks", "annotations": []},
    ],
}
TSV = (
    "<PR>find<PRAN>name.movie<PRAV>Dune<PRAV>Nope<C><S><A>Hello.<U>What is on?<PN>find<PAN>location<PAV>here"
    "\t[A]Dune and Nope.\tdlg-1\r\n"
    '"<U>I want ""Dune""."\t"[A]OK.[PN]book[PAN]name.movie[PAV]""Dune"""\tdlg-2\r\n'
    "<S>\t[A]Hello.\tdlg-3\r\n"
)
HH_ROW = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: Take care",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant: No",
}


def judge(instruction: str, response: str) -> str:
    return (
        f"###Task\n\n###The instruction to evaluate:\n{instruction}\n\n###Response to evaluate:\n{response}"
        "\n\n###Score Rubrics:\n[x]"
    )


HHH_ROW = {
    "source": "honest",
    "chosen_instruction": judge("Hi\n\nAssistant: Yes?\n\nHuman: Is it late?", "It is nine."),
    "rejected_instruction": judge("Hi\n\nAssistant: Yes?\n\nHuman: Is it late?", "Dunno."),
}


def reply(text: str, rank: int | None, synthetic: bool = False, replies: list[Any] | None = None) -> dict[str, Any]:
    found = {"text": text, "role": "assistant", "synthetic": synthetic, "deleted": False, "replies": replies or []}
    return found if rank is None else found | {"rank": rank}


OASST_ROW: dict[str, Any] = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": {
        "text": "Why is the sky blue?",
        "role": "prompter",
        "replies": [
            reply("worst", 2),
            reply("made by a model", 1, synthetic=True),
            reply(
                "best",
                0,
                replies=[{"text": "And red?", "role": "prompter", "replies": [reply("b", 1), reply("a", 0)]}],
            ),
        ],
    },
}


def panda(one: int, two: int, three: int, **changes: Any) -> dict[str, Any]:
    row = {"idx": 1, "instruction": "Say it.", "input": "", "response1": "first", "response2": "second"}
    return row | {"annotator1": one, "annotator2": two, "annotator3": three} | changes


LLMBAR_ROW = {"input": "Add 1 and 2", "output_1": "4", "output_2": "3", "label": 2}


SHP_ROW: dict[str, Any] = {
    "post_id": "qt3nxl",
    "domain": "askculinary_train",
    "history": "How do I peel a raspberry?",
    "human_ref_A": "You don't.",
    "human_ref_B": "With patience.",
    "labels": 0,
    "score_ratio": 4.0,
}

TLDR_ROW: dict[str, Any] = {
    "info": {"id": "t3_2z", "post": "I lost my keys.", "title": "Keys", "subreddit": "advice", "site": None},
    "summaries": [{"text": " Keys gone. ", "policy": "sup1", "note": "ok"}, {"text": "Lost.", "policy": "ref"}],
    "choice": 1,
    "worker": "w",
    "batch": "batch3",
    "split": "train",
    "extra": {},
}


def graded(passage: str, *ratings: str, question: str = "When?") -> dict[str, Any]:
    reference = {"page_title": "Title", "section_headers": ["Part"], "section_content": passage}
    return {"question": question, "passage": {"reference": reference}, "feedback": [""], "rating": list(ratings)}


STORY: dict[str, Any] = {
    "metadata": {"passage_id": "7"},
    "document": "Once.",
    "questions": [{"question_text": "What happens?", "responses": [{"response_text": "Nothing."}]}],
}


def summary(text: str, *ranks: int) -> dict[str, Any]:
    return {"response": text, "reviews": [{"worker_id": str(n), "overall-rank": rank} for n, rank in enumerate(ranks)]}


SQUALITY_ROW: dict[str, Any] = {
    "passage-id": "7",
    "questions": {
        "0": {"bart": summary("B", 3, 2, 3), "bart-dpr": summary("D", 2, 3, 2), "human": summary("H", 1, 1, 1)}
    },
}


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def block(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def example(features: dict[str, list[Any]]) -> bytes:
    """A `tf.train.Example`, written by the protobuf rules."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            held = block(1, b"".join(block(1, value) for value in values))
        elif isinstance(values[0], float):
            held = block(2, block(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            held = block(3, block(1, b"".join(varint(value) for value in values)))
        entries += block(1, block(1, name.encode()) + block(2, held))
    return block(1, entries)


def framed(content: bytes) -> bytes:
    """One TFRecord frame; its CRC function has a test of its own."""

    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(content))
    return length + masked(length) + content + masked(content)


UIBERT_FEATURES: dict[str, list[Any]] = {
    "image/id": [b"300"],
    "image/ref_exp/text": [b"press save"],
    "image/ref_exp/label": [1],
    "image/object/bbox/xmin": [0.0, 0.5],
    "image/object/bbox/xmax": [0.5, 1.0],
    "image/object/bbox/ymin": [0.0, 0.5],
    "image/object/bbox/ymax": [0.5, 1.0],
    "image/view_hierarchy/bbox/xmin": [0.5],
    "image/view_hierarchy/bbox/xmax": [1.0],
    "image/view_hierarchy/bbox/ymin": [0.5],
    "image/view_hierarchy/bbox/ymax": [0.9375],
    "image/view_hierarchy/class/name": [b"BUTTON"],
    "image/view_hierarchy/text": [b"save"],
    "image/view_hierarchy/description": [b""],
    "image/view_hierarchy/id/name": [b"saveButton"],
}
UIBERT = framed(example(UIBERT_FEATURES))


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value % 2**64)


def node(box: tuple[int, int, int, int], *, visible: bool = True, clickable: bool = False, **words: str) -> bytes:
    """An AndroidAccessibilityNodeInfo; protobuf writes no field that is zero or empty."""
    numbers = {"kind": 3, "about": 4, "shown": 7}
    edges = b"".join(number(side, edge) for side, edge in enumerate(box, start=1) if edge)
    texts = b"".join(block(numbers[name], word.encode()) for name, word in words.items())
    return number(1, 9) + block(2, edges) + texts + number(14, 1) * clickable + number(23, 1) * visible


def forest(*windows: list[bytes]) -> bytes:
    """An AndroidAccessibilityForest; each window has a title and a layer besides its tree."""
    return b"".join(
        block(1, number(4, 2) + block(5, b"window") + block(11, b"".join(block(1, found) for found in nodes)))
        for nodes in windows
    )


ANDROID_SCREEN = forest(
    [
        node((0, 0, 100, 200), kind="android.widget.FrameLayout"),
        node((-5, 10, 50, 30), kind="android.widget.Button", shown=" Save\nnow ", about="Keeps it", clickable=True),
        node((0, 40, 100, 60), shown="Out of sight", visible=False),
        node((10, 50, 10, 60), shown="No area"),
    ],
    [node((60, 10, 101, 30), kind="View", clickable=True), node((0, 70, 40, 90), shown="Hi", about="Hi")],
)
ANDROID_FEATURES: dict[str, list[Any]] = {
    "episode_id": [7],
    "goal": [b"Save the note."],
    "screenshots": [b"png"] * 3,
    "accessibility_trees": [ANDROID_SCREEN, b"", b""],
    "screenshot_widths": [100] * 3,
    "screenshot_heights": [200] * 3,
    "actions": [b'{"y": 20, "action_type": "click", "x": 20}', b'{"action_type":"navigate_back"}'],
    "step_instructions": [b"Press save", b"Go back"],
}


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


ASKED, GOOD, POOR = (
    said("user", "Is it open?"),
    said("assistant", "Until nine."),
    said("assistant", "Go away."),
)
FEEDBACK_ROW: dict[str, Any] = {
    "id": "f1",
    "user_id": "u1",
    "version": 0,
    "type": "rating",
    "data": {"rating": -1, "model_id": "m", "sibling_model_ids": None, "reason": "other", "details": {"rating": 3}},
    "meta": {"message_id": "m2", "chat_id": "c", "message_index": 1},
    "snapshot": {
        "chat": {
            "id": "c",
            "title": "Hours",
            "chat": {
                "models": ["m"],
                "params": {"system": "Be kind."},
                "history": {
                    "currentId": "m3",
                    "messages": {
                        "m1": ASKED | {"id": "m1", "parentId": None, "childrenIds": ["m2", "m3"], "timestamp": 1},
                        "m2": POOR | {"id": "m2", "parentId": "m1", "childrenIds": [], "done": True},
                        "m3": GOOD | {"id": "m3", "parentId": "m1", "childrenIds": []},
                    },
                },
            },
        }
    },
}
TASK_ROW: dict[str, Any] = {
    "id": 1,
    "data": {"prompt": "Is it open?", "one": "Until nine.", "two": "Go away."},
    "annotations": [
        {
            "id": 5,
            "completed_by": {"id": 3, "email": "ann@example.org"},
            "was_cancelled": False,
            "result": [
                {"from_name": "pw", "to_name": "one,two", "type": "pairwise", "value": {"selected": "right"}, "id": "x"}
            ],
        },
        {"id": 6, "completed_by": 4, "was_cancelled": True, "result": []},
    ],
    "predictions": [],
}
ARGILLA_ROW: dict[str, Any] = {
    "id": "r1",
    "status": "completed",
    "_server_id": "s",
    "fields": {"prompt": "Is it open?", "response": "Until nine."},
    "metadata": {},
    "suggestions": {"kind": {"value": "no", "score": None, "agent": None}},
    "responses": {"kind": [{"value": "yes", "user_id": "u1"}, {"value": "no", "user_id": "u2"}]},
    "vectors": {},
}
OPENAI_ROW: dict[str, Any] = {
    "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [GOOD],
    "non_preferred_output": [POOR],
}
SHAREGPT_ROW: dict[str, Any] = {
    "conversations": [
        {"from": "human", "value": "Is it open?"},
        {"from": "function_call", "value": '{"name": "hours", "arguments": {"day": "today"}}'},
        {"from": "observation", "value": "9-21"},
        {"from": "gpt", "value": "Until nine."},
    ],
    "system": "Be kind.",
    "tools": '[{"name": "hours", "description": "When?", "parameters": {"type": "object"}}]',
}
ARENA_ROW: dict[str, Any] = {
    "question_id": "q",
    "model_a": "x",
    "model_b": "y",
    "winner": "model_b",
    "judge": "ann",
    "turn": 1,
    "conversation_a": [ASKED, POOR, said("user", "Why?"), POOR],
    "conversation_b": [ASKED, GOOD, said("user", "Why?"), GOOD],
}
HELPSTEER_ROW: dict[str, Any] = {
    "context": [ASKED],
    "response1": "Until nine.",
    "response2": "Go away.",
    "overall_preference": -2,
    "individual_preference": [],
}


def graded_answer(text: str, *grades: str) -> dict[str, Any]:
    return {"response": text, "model": "m", "annotations": {str(n): {"Rating": g} for n, g in enumerate(grades)}}


ULTRAFEEDBACK_ROW: dict[str, Any] = {
    "source": "set",
    "instruction": "Is it open?",
    "models": ["a", "b"],
    "completions": [graded_answer("Go away.", "1", "N/A"), graded_answer("Until nine.", "5", "4")],
}

ROWS: dict[str, list[Any]] = {
    "taskmaster-rewards": [REWARD_ROW],
    "taskmaster-dialogs": [DIALOG_ROW],
    "hh": [HH_ROW],
    "hhh": [HHH_ROW],
    "oasst": [OASST_ROW],
    "oasst-messages": [
        {"message_id": "a", "parent_id": None, "text": "Why?", "role": "prompter", "rank": None},
        {"message_id": "b", "parent_id": "a", "text": "So.", "role": "assistant", "rank": 0},
        {"message_id": "c", "parent_id": "a", "text": "No.", "role": "assistant", "rank": 1},
    ],
    "pandalm": [panda(1, 1, 2)],
    "llmbar": [LLMBAR_ROW],
    "shp": [SHP_ROW],
    "tldr": [TLDR_ROW],
    "feedbackqa": [graded("a", "Bad", "Excellent"), graded("b", "Bad", "Bad")],
    "squality": [SQUALITY_ROW],
    "squality-summaries": [STORY],
    "trl": [
        {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5, "weight": 2.0, "annotator": "x"},
        {"prompt": [{"role": "user", "content": "p"}], "completion": "c", "label": True},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]},
    ],
    "open-webui": [FEEDBACK_ROW],
    "label-studio": [TASK_ROW],
    "argilla": [ARGILLA_ROW],
    "openai": [OPENAI_ROW],
    "swift": [{"messages": [ASKED, GOOD], "rejected_response": "Go away."}],
    "sharegpt": [SHAREGPT_ROW],
    "arena": [ARENA_ROW],
    "helpsteer": [HELPSTEER_ROW],
    "ultrafeedback": [ULTRAFEEDBACK_ROW],
    "alpaca": [{"instruction": "Is it open?", "input": "Today.", "output": "Until nine.", "history": [["a", "b"]]}],
}
"""JSON layouts by format name (`taskmaster-tsv` and `uibert` are not JSON)."""
