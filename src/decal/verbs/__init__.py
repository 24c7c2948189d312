"""The verbs: one file each, and the only place that wires the layers together."""
