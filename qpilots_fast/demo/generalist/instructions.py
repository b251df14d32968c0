"""How the six tasks are told: phrasings that the policy was trained on, and others that it never saw.

`instructions.safetensors` holds their sentence embeddings (all-MiniLM-L6-v2, 384 wide), made by
examples/generalist/embed_instructions.py, so that running the policy needs no sentence encoder.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from torch import Tensor

from ...files import read_tensors

ASSETS = Path(__file__).parents[2] / "assets" / "generalist"
EMBEDDING_DIM = 384

TRAINED = {
    "push-v3": (
        "push the puck to the goal",
        "slide the puck across the table to the target",
        "move the puck along the table to the goal position",
        "shove the small cylinder to the marked spot",
        "push the object on the table until it reaches the target",
        "bring the puck to the goal without lifting it",
    ),
    "pick-place-v3": (
        "pick up the puck and place it at the goal",
        "grasp the puck, lift it and carry it to the target",
        "lift the object and hold it at the goal position",
        "take the puck off the table and bring it to the target in the air",
        "pick the small cylinder up and move it to the marked spot above the table",
        "grab the puck and raise it to the goal",
    ),
    "door-open-v3": (
        "open the door",
        "pull the door open by its handle",
        "swing the door of the safe open",
        "hook the door handle and pull it towards you",
        "open the cabinet door all the way",
        "get the door open",
    ),
    "drawer-open-v3": (
        "open the drawer",
        "pull the drawer out by its handle",
        "slide the drawer open",
        "grab the drawer's handle and pull",
        "draw the drawer out of its box",
        "get the drawer open",
    ),
    "peg-insert-side-v3": (
        "insert the peg into the hole in the side",
        "put the peg sideways into the box",
        "pick up the peg and push it into the hole",
        "grasp the peg and insert it from the side",
        "plug the stick into the opening of the block",
        "slide the peg into the socket",
    ),
    "window-open-v3": (
        "open the window",
        "slide the window open",
        "push the window's handle to the right",
        "move the window pane aside to open it",
        "get the window open",
        "slide the window handle until the window is open",
    ),
}

HELD_OUT = {
    "push-v3": (
        "nudge the puck over to where it should go",
        "get the puck to the goal by pushing it",
        "please scoot that disc over to the target location",
    ),
    "pick-place-v3": (
        "lift the puck up and set it down at the target",
        "pick the disc up and deliver it to the goal",
        "please grab the object and take it up to the goal location",
    ),
    "door-open-v3": (
        "please open up the door",
        "pull on the handle until the door is open",
        "unclose the door of the cupboard",
    ),
    "drawer-open-v3": (
        "please pull open the drawer",
        "tug the drawer towards you until it is out",
        "make the drawer come out",
    ),
    "peg-insert-side-v3": (
        "stick the peg into the side hole",
        "fit the peg in the hole of the box",
        "please get the rod inside the slot on the side",
    ),
    "window-open-v3": (
        "please slide open the window",
        "push the window sideways so that air comes in",
        "unshut the window",
    ),
}

TASKS = tuple(TRAINED)


@cache
def _embeddings() -> dict[str, Tensor]:
    stored, _ = read_tensors(ASSETS / "instructions.safetensors")
    return {
        sentence: row.float()
        for task in TASKS
        for sentence, row in zip((*TRAINED[task], *HELD_OUT[task]), stored[task], strict=True)
    }


def embedding(sentence: str) -> Tensor:
    """The stored embedding [384] of a phrasing of TRAINED or HELD_OUT, of length 1.

    Raises:
        KeyError: for any other sentence; add it to this file and run examples/generalist/embed_instructions.py.
    """
    return _embeddings()[sentence]
