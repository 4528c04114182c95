/** Which study tells what the features of a model mean. */
import { api, embedded, type Study } from "../api";

let known: Promise<Study[]> | null = null;

/** All studies that the server finds; asked once, and again after a failure. */
export function allStudies(): Promise<Study[]> {
  known ??= api.studies().then(
    (answer) => answer.studies,
    (error) => {
      known = null;
      throw error;
    },
  );
  return known;
}

/** The study of a model that has a feature, of its decoder or its vision tower: one with labels if there is one. Empty when there is none. */
export async function studyOf(model: string, feature: string): Promise<string> {
  if (embedded !== null) return "";
  const tower = feature.startsWith("T");
  const own = (await allStudies()).filter((study) => (!model || study.model === model) && study.layers.some(({ layer }) => layer < 0 === tower));
  return (own.find((study) => study.labels.length) ?? own[0])?.id ?? "";
}

/** Layer and index of `L5/709`. */
export function parts(feature: string): [number, number] {
  const [, layer = "0", index = "0"] = /^L(\d+)\/(\d+)$/.exec(feature) ?? [];
  return [Number(layer), Number(index)];
}

export const isFeature = (text: string): boolean => /^L\d+\/\d+$/.test(text);
