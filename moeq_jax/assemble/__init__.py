"""Assembly: the chosen codes become QTensors, the QTensors become a model that runs."""
