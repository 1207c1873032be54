from peft_mask.analysis import masks_of
from tests.simulated_device.models import masked, train
from tests.simulated_device.scenarios import scenario


@scenario
def masks_as_values(device, folder):
    masks = []
    for rule in ("magnitude", "random"):
        model = masked(device, candidate_rule=rule)
        train(model, device)
        masks.append(masks_of(model))
    return [str(masks[0]), str(masks[1]), str(masks[0] & masks[1]), (masks[0] - masks[1]).sparsity]
