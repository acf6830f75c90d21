"""What is said of too little memory, and whom it ends."""

import pytest
import torch

from megaswitch.log import UserError
from megaswitch.train.memory import enough_memory


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")]
)
@pytest.mark.parametrize(("alone", "kind"), [(True, UserError), (False, MemoryError)])
def test_a_failed_allocation_gets_a_remedy(error, alone, kind):
    with (
        pytest.raises(kind, match="not enough memory: take less"),
        enough_memory("take less", alone=alone),
    ):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"), enough_memory("take less"):
        raise RuntimeError("something else")
