"""Where scores come from: functions, classifiers, reward models, AI judges."""
