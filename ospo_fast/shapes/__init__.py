"""The Shapes world: scenes, a renderer, a checker and a small Janus model, to run all of OSPO on a CPU."""
