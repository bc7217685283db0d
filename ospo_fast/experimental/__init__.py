"""Features that no measurement has shown to help yet. Core imports them lazily, each through one plain argument."""
