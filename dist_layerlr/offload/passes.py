"""What a streamed model is doing: a forward, a backward, or neither.

``Pass`` says where the model stands, and ``TRANSITIONS`` is this table:

====================  ====================  ============  ====================  =============
pass                  forward begins        forward ends  backward begins       backward ends
====================  ====================  ============  ====================  =============
OUTSIDE               FORWARD               OUTSIDE (1)   BACKWARD              OUTSIDE (2)
FORWARD               FORWARD (3)           OUTSIDE       BACKWARD_IN_FORWARD   FORWARD (2)
BACKWARD              BACKWARD_IN_FORWARD   BACKWARD (1)  (4)                   OUTSIDE
BACKWARD_IN_FORWARD   itself (3)            BACKWARD      (4)                   FORWARD
====================  ====================  ============  ====================  =============

1. The forward was refused before it began; torch calls the hook behind it all the same.
2. The end of backward is idempotent: ``close`` calls it, too.
3. The forward before was interrupted (KeyboardInterrupt), or the model calls itself.
4. One graph task is watched at a time, the outermost; a nested one is part of it.

BACKWARD_IN_FORWARD is ``torch.autograd.grad`` inside the model's forward. A forward *inside* a
backward pass (recomputation, or a hook that calls the model) changes nothing here: it is part of
that pass. Only torch knows that, per thread: ``graph_task() != -1``. A unit that is called while
the pass is OUTSIDE, without its model, is a pass of its own and ends with its forward.
"""

from __future__ import annotations

from enum import Enum


class Pass(Enum):
    """What the streamed model is doing. The table above says what follows what."""

    OUTSIDE = "outside"
    FORWARD = "forward"
    BACKWARD = "backward"
    BACKWARD_IN_FORWARD = "backward in forward"

    @property
    def in_forward(self) -> bool:
        """Whether a forward of the whole model is running."""
        return self in (Pass.FORWARD, Pass.BACKWARD_IN_FORWARD)

    @property
    def in_backward(self) -> bool:
        """Whether a backward pass runs through the model whose end was not seen yet."""
        return self in (Pass.BACKWARD, Pass.BACKWARD_IN_FORWARD)


class Trigger(Enum):
    """What moves the model from one pass to another."""

    FORWARD_BEGINS = "forward begins"
    FORWARD_ENDS = "forward ends"
    BACKWARD_BEGINS = "backward begins"
    BACKWARD_ENDS = "backward ends"


TRANSITIONS = {
    (Pass.OUTSIDE, Trigger.FORWARD_BEGINS): Pass.FORWARD,
    (Pass.OUTSIDE, Trigger.FORWARD_ENDS): Pass.OUTSIDE,
    (Pass.OUTSIDE, Trigger.BACKWARD_BEGINS): Pass.BACKWARD,
    (Pass.OUTSIDE, Trigger.BACKWARD_ENDS): Pass.OUTSIDE,
    (Pass.FORWARD, Trigger.FORWARD_BEGINS): Pass.FORWARD,
    (Pass.FORWARD, Trigger.FORWARD_ENDS): Pass.OUTSIDE,
    (Pass.FORWARD, Trigger.BACKWARD_BEGINS): Pass.BACKWARD_IN_FORWARD,
    (Pass.FORWARD, Trigger.BACKWARD_ENDS): Pass.FORWARD,
    (Pass.BACKWARD, Trigger.FORWARD_BEGINS): Pass.BACKWARD_IN_FORWARD,
    (Pass.BACKWARD, Trigger.FORWARD_ENDS): Pass.BACKWARD,
    (Pass.BACKWARD, Trigger.BACKWARD_ENDS): Pass.OUTSIDE,
    (Pass.BACKWARD_IN_FORWARD, Trigger.FORWARD_BEGINS): Pass.BACKWARD_IN_FORWARD,
    (Pass.BACKWARD_IN_FORWARD, Trigger.FORWARD_ENDS): Pass.BACKWARD,
    (Pass.BACKWARD_IN_FORWARD, Trigger.BACKWARD_ENDS): Pass.FORWARD,
}
