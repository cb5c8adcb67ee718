"""model + plan + mesh -> Program, on fake tensors and a fake process group: no devices, no real memory."""
